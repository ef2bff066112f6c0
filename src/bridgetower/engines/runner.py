"""What computes exported parts: arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from bridgetower.engines.config import EngineName, Precision
from bridgetower.engines.onnxruntime_runner import OnnxRuntimeRunner
from bridgetower.engines.openvino_runner import OpenVinoRunner
from bridgetower.engines.parts import PartName


class Runner(Protocol):
    """Runs the parts of one exported folder; a part is loaded when it is first run."""

    def run(self, part: PartName, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the outputs of a part for its inputs, both in the order of `Part`."""


def make_runner(engine: EngineName, folder: Path, precision: Precision) -> Runner:
    """Returns what runs a folder's parts.

    Args:
        engine: One that runs parts.
        folder: With parts in the form for that engine and precision.
        precision: To compute in.

    Raises:
        FileNotFoundError: The engine's package is not installed.
    """
    return OpenVinoRunner(folder, precision) if engine == "openvino" else OnnxRuntimeRunner(folder)
