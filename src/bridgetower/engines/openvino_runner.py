"""Exported parts in OpenVINO on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bridgetower.engines.config import Precision
from bridgetower.engines.parts import PartName
from bridgetower.engines.signal_stack import kept_signal_stack
from bridgetower.extras import require

_HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoRunner:
    """Runs ONNX graphs with as many threads as PyTorch has."""

    def __init__(self, folder: Path, precision: Precision = "fp32") -> None:
        """Loads nothing yet.

        Args:
            folder: With a graph per part.
            precision: `fp32`, or `bf16` for linear layers and attention on hardware that has it.

        Raises:
            FileNotFoundError: OpenVINO is not installed.
        """
        require("openvino", "openvino")
        self._folder, self._hint = folder, _HINTS[precision]
        self._compiled: dict[PartName, Any] = {}

    def run(self, part: PartName, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Runs a part; the outputs are the caller's."""
        compiled = self._compiled.get(part) or self._compile(part)
        outputs = compiled(list(inputs), share_inputs=True, share_outputs=False)
        return [outputs[port] for port in compiled.outputs]

    def _compile(self, part: PartName) -> Any:
        import openvino

        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": self._hint,
        }
        with kept_signal_stack():
            compiled = openvino.Core().compile_model(self._folder / f"{part}.onnx", "CPU", settings)
        self._compiled[part] = compiled
        return compiled
