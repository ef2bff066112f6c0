"""Exported parts in ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bridgetower.engines.parts import PartName
from bridgetower.extras import require


class OnnxRuntimeRunner:
    """Runs ONNX graphs with as many threads as PyTorch has."""

    def __init__(self, folder: Path) -> None:
        """Loads nothing yet.

        Args:
            folder: With a graph per part.

        Raises:
            FileNotFoundError: ONNX Runtime is not installed.
        """
        require("onnx", "onnxruntime")
        self._folder = folder
        self._sessions: dict[PartName, Any] = {}

    def run(self, part: PartName, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Runs a part.

        Raises:
            ValueError: Its graph cannot be loaded.
        """
        session = self._sessions.get(part) or self._load(part)
        names = [node.name for node in session.get_inputs()]
        outputs: list[np.ndarray] = session.run(None, dict(zip(names, inputs, strict=True)))
        return outputs

    def _load(self, part: PartName) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Between two parts, threads of the one must not keep those of the other from the cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        path = self._folder / f"{part}.onnx"
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._sessions[part] = session
        return session
