"""What computes exported parts on the CPU, arrays in and arrays out: ONNX Runtime and OpenVINO."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bridgetower.engines.config import EngineName, Precision
from bridgetower.engines.parts import PartName
from bridgetower.extras import require

_HINTS = {"fp32": "f32", "bf16": "bf16"}


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


class SignalStack(ctypes.Structure):
    """`stack_t` of Linux (sigaltstack(2))."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Leaves the thread the stack that it had.

    OpenVINO installs one with every model that it compiles, and puts the one before back when the model goes. Of models
    that go in another order than they came, one is left that is no longer there, and the next signal, Ctrl-C included,
    kills the process.
    """
    if sys.platform != "linux":
        yield
        return
    before = signal_stack()
    try:
        yield
    finally:
        ctypes.CDLL(None).sigaltstack(ctypes.byref(before), None)


def signal_stack() -> SignalStack:
    """Returns where the thread handles signals, on Linux."""
    found = SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
    return found
