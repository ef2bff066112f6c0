"""A predictor's engine made of exported parts, which ONNX Runtime or OpenVINO computes on the CPU."""

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
from jaxtyping import Float, Int
from torch import Tensor

from bridgetower.engines.config import EngineName, Precision
from bridgetower.engines.parts import PartName
from bridgetower.model.bridgetower import IMAGE, BridgeTower, EncodeOutputs
from bridgetower.model.cpu import optimize_for_cpu
from bridgetower.model.fusion import Encoded, Fused, FusionOutputs, Mask


class PartsEngine:
    """Runs towers and fusion encoder as exported parts; of the model's weights, only those of the heads are read."""

    def __init__(self, model: BridgeTower, runner: Runner) -> None:
        self.model, self.device = model.requires_grad_(False), torch.device("cpu")
        self._runner = runner
        optimize_for_cpu(model)

    def encode_image(
        self, pixel_values: Float[Tensor, "b 3 h w"], token_type: int = IMAGE, *, outputs: EncodeOutputs = "layers"
    ) -> Encoded:
        side = self.model.config.vision.image_size
        if pixel_values.shape[-2:] != (side, side):
            raise ValueError(
                f"images of {pixel_values.shape[-1]} x {pixel_values.shape[-2]} pixels; this engine was built for "
                f"{side} x {side}: pass image_size to load"
            )
        if outputs == "cls":
            return Encoded((), self._run("image_cls", pixel_values)[0])
        *layers, cls = self._run("image", pixel_values)
        token_types = self.model.token_type_embedding.weight
        if token_type != IMAGE:  # the part adds the one of a single image
            layers = [layer + (token_types[token_type] - token_types[IMAGE]) for layer in layers]
        return Encoded(tuple(layers), cls)

    def encode_text(
        self, input_ids: Int[Tensor, "b l"], attention_mask: Mask = None, *, outputs: EncodeOutputs = "layers"
    ) -> Encoded:
        self.model.config.text.check_length(input_ids.shape[1])
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(torch.int64)
        if outputs == "cls":
            return Encoded((), self._run("text_cls", input_ids, mask)[0])
        *layers, cls = self._run("text", input_ids, mask)
        return Encoded(tuple(layers), cls, None if attention_mask is None else attention_mask.bool())

    def cache_image(self, image: Encoded) -> Encoded:
        """Returns `image`: parts share nothing between pairs."""
        return image

    def cache_text(self, text: Encoded) -> Encoded:
        """Returns `text`: parts share nothing between pairs."""
        return text

    def fuse(self, image: Encoded, text: Encoded, outputs: FusionOutputs = "pooled") -> Fused:
        if outputs == "all":
            raise ValueError('outputs="all" is not exported; expected "pooled" or "text", or load with engine="torch"')
        if len(image) != len(text):
            raise ValueError(
                f"{len(image)} images and {len(text)} texts; expected one text per image: index them first"
            )
        mask = torch.ones(text.layers[0].shape[:2]) if text.mask is None else text.mask
        part: PartName = "fusion_text" if outputs == "text" else "fusion_pooled"
        (output,) = self._run(part, *image.layers, *text.layers, mask.to(torch.int64))
        return Fused(**{outputs: output})

    def _run(self, part: PartName, *inputs: Tensor) -> list[Tensor]:
        arrays = [np.ascontiguousarray(tensor.numpy()) for tensor in inputs]
        return [torch.from_numpy(output) for output in self._runner.run(part, arrays)]


class Runner(ABC):
    """Runs the parts of one exported folder, in any number of threads, with as many threads as PyTorch has."""

    def __init__(self, folder: Path, precision: Precision = "fp32") -> None:
        self._folder, self._precision = folder, precision
        self._loaded: dict[PartName, Any] = {}
        self._loading = Lock()

    def __reduce__(self) -> tuple[type[Runner], tuple[Path, Precision]]:
        return type(self), (self._folder, self._precision)

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


class OnnxRuntimeRunner(Runner):
    """ONNX Runtime, whose sessions may be used by several threads."""

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
    """OpenVINO, whose requests hold the inputs and outputs of a call, so that each thread takes its own."""

    def _load(self, path: Path) -> Any:
        import openvino

        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[self._precision],
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


def make_runner(engine: EngineName, folder: Path, precision: Precision) -> Runner:
    return (OpenVinoRunner if engine == "openvino" else OnnxRuntimeRunner)(folder, precision)


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
    found = SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
    return found
