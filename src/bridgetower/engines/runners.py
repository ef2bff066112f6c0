"""What computes exported parts on the CPU, arrays in and arrays out: ONNX Runtime and OpenVINO."""

from __future__ import annotations

import ctypes
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from bridgetower.engines.config import EngineName, Precision
from bridgetower.engines.parts import PartName
from bridgetower.extras import require

_HINTS = {"fp32": "f32", "bf16": "bf16"}


class Runner(ABC):
    """Runs the parts of one exported folder, in any number of threads, with as many threads as PyTorch has."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaded: dict[PartName, Any] = {}
        self._loading = Lock()

    def run(self, part: PartName, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the outputs of a part, which is loaded when it is first run; both are in the order of `Part`."""
        with self._loading:
            if part not in self._loaded:
                self._loaded[part] = self._load(self._folder / f"{part}.onnx")
        return self._run(self._loaded[part], inputs)

    @abstractmethod
    def _load(self, path: Path) -> Any: ...

    @abstractmethod
    def _run(self, loaded: Any, inputs: Sequence[np.ndarray]) -> list[np.ndarray]: ...


def make_runner(engine: EngineName, folder: Path, precision: Precision) -> Runner:
    """Returns what runs a folder's parts."""
    return OpenVinoRunner(folder, precision) if engine == "openvino" else OnnxRuntimeRunner(folder)


class OnnxRuntimeRunner(Runner):
    """Runs ONNX graphs in ONNX Runtime, whose sessions may be used by several threads."""

    def __init__(self, folder: Path) -> None:
        require("onnx", "onnxruntime")
        super().__init__(folder)

    def _load(self, path: Path) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Between two parts, threads of the one must not keep those of the other from the cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def _run(self, loaded: Any, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        names = [node.name for node in loaded.get_inputs()]
        outputs: list[np.ndarray] = loaded.run(None, dict(zip(names, inputs, strict=True)))
        return outputs


class OpenVinoRunner(Runner):
    """Runs ONNX graphs in OpenVINO; a request holds the inputs and outputs of a call, so each thread takes its own."""

    def __init__(self, folder: Path, precision: Precision = "fp32") -> None:
        require("openvino", "openvino")
        super().__init__(folder)
        self._hint = _HINTS[precision]

    def _load(self, path: Path) -> Any:
        import openvino

        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": self._hint,
        }
        with kept_signal_stack():
            return openvino.Core().compile_model(path, "CPU", settings), []

    def _run(self, loaded: Any, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        compiled, idle = loaded
        try:
            request = idle.pop()
        except IndexError:
            request = compiled.create_infer_request()
        outputs = request.infer(list(inputs), share_inputs=True, share_outputs=False)
        idle.append(request)
        return [outputs[port] for port in compiled.outputs]


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
