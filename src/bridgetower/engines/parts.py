"""Parts in which a model is exported, and the engine that runs them on a CPU."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from bridgetower.engines.config import EngineName, Precision
from bridgetower.model.bridgetower import IMAGE, BridgeTower, EncodeOutputs
from bridgetower.model.cpu import optimize_for_cpu
from bridgetower.model.fusion import Encoded, Fused, FusionOutputs, Mask
from bridgetower.model.heads import HeadInputs, chosen_heads
from bridgetower.model.layers import Pixels, TokenIds

PartName = Literal["image", "image_cls", "text", "text_cls", "fusion_pooled", "fusion_text"]

_LARGEST_BATCH = 1 << 16
_PARTS_OF: dict[HeadInputs, tuple[PartName, ...]] = {
    "pooled": ("fusion_pooled",),
    "pooled_pair": ("fusion_pooled",),
    "text": ("fusion_text",),
    "image_cls": ("image_cls",),
    "text_cls": ("text_cls",),
    "both_cls": ("image_cls", "text_cls"),
}


def part_names(model: BridgeTower) -> tuple[PartName, ...]:
    """Returns the parts that embeddings, fusion and the heads of a model need."""
    specs = model.extensions.head_specs
    names: list[PartName] = ["image", "text", "fusion_pooled"]
    for head in chosen_heads(model.config.heads):
        names += _PARTS_OF[specs[head].inputs]
    return tuple(dict.fromkeys(names))


class ExportedPart(nn.Module):
    """A part of a model with random inputs for its export: two images or texts, the second text padded."""

    def __init__(self, model: BridgeTower, name: PartName) -> None:
        super().__init__()
        self.model = model
        self._tower, _, self._outputs = name.partition("_")

        # Random inputs, the second text of which is padded.
        config = model.config.text
        generator = torch.Generator().manual_seed(0)
        side = model.config.vision.image_size
        length = min(8, config.max_length)
        pixel_values = torch.randn(2, 3, side, side, generator=generator)
        input_ids = torch.randint(config.vocab_size - 1, (2, length), generator=generator)
        input_ids += input_ids >= config.pad_token_id  # any id but that of padding
        mask = torch.ones_like(input_ids)
        input_ids[1, length // 2 :] = config.pad_token_id
        mask[1, length // 2 :] = 0

        # Names and sizes that vary, of inputs and outputs.
        rows = {0: Dim("batch", min=1, max=_LARGEST_BATCH)}
        tokens = rows | {1: Dim("length", min=1, max=config.max_length)}
        images = {f"image_{number}": rows for number in range(len(model.config.vision_layers))}
        texts = {f"text_{number}": tokens for number in range(len(model.config.text_layers))}
        self.inputs: tuple[Tensor, ...]
        self.dynamic: dict[str, dict[int, Dim]]  # the sizes that vary, by the name of the input
        if self._tower == "image":
            self.inputs = (pixel_values,)
            self.dynamic = {"pixel_values": rows}
        elif self._tower == "text":
            self.inputs = (input_ids, mask)
            self.dynamic = {"input_ids": tokens, "attention_mask": tokens}
        else:
            with torch.no_grad():
                image = model.encode_image(pixel_values)
                text = model.encode_text(input_ids, mask)
            self.inputs = (*image.layers, *text.layers, mask)
            self.dynamic = images | texts | {"attention_mask": tokens}
        layers = images if self._tower == "image" else texts
        self.output_names = [self._outputs] if self._outputs else [*layers, "cls"]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs: Any = self._outputs or "layers"
        if self._tower == "image":
            image = self.model.encode_image(inputs[0], outputs=outputs)
            return *image.layers, image.cls
        if self._tower == "text":
            text = self.model.encode_text(*inputs, outputs=outputs)
            return *text.layers, text.cls
        count = len(self.model.config.vision_layers)
        images = inputs[:count]
        texts = inputs[count:-1]
        # Fusion does not read the CLS of a tower, so any tensor of its shape will do.
        image = Encoded(images, images[0][:, 0])
        text = Encoded(texts, texts[0][:, 0], inputs[-1].bool())
        return (getattr(self.model.fuse(image, text, outputs), outputs),)

    def examples(self) -> Iterator[tuple[Tensor, ...]]:
        """Yields the inputs, and their first half without the last token."""
        yield self.inputs
        halves = []
        for tensor, sizes in zip(self.inputs, self.dynamic.values(), strict=True):
            half = tensor[:1]
            has_length = 1 in sizes
            halves.append(half[:, :-1] if has_length else half)
        yield tuple(halves)

    def exported(self) -> ExportedProgram:
        sizes = (tuple(self.dynamic.values()),)
        with torch.no_grad():
            return torch.export.export(self, self.inputs, dynamic_shapes=sizes, strict=False)


class PartsEngine:
    """Runs towers and fusion encoder as exported parts, and reads no weights of the model but those of the heads."""

    def __init__(self, model: BridgeTower, runner: Runner) -> None:
        self.model = model.requires_grad_(False)
        self.device = torch.device("cpu")
        self._runner = runner
        optimize_for_cpu(model)

    def encode_image(
        self,
        pixel_values: Pixels,
        token_type: int = IMAGE,
        *,
        outputs: EncodeOutputs = "layers",
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
        # The part adds the token type of a single image.
        if token_type != IMAGE:
            change = token_types[token_type] - token_types[IMAGE]
            layers = [layer + change.to(layer.dtype) for layer in layers]
        return Encoded(tuple(layers), cls)

    def encode_text(
        self,
        input_ids: TokenIds,
        attention_mask: Mask = None,
        *,
        outputs: EncodeOutputs = "layers",
    ) -> Encoded:
        self.model.config.text.check_length(input_ids.shape[1])
        mask = None
        int_mask = torch.ones_like(input_ids)
        if attention_mask is not None:
            mask = attention_mask.bool()
            int_mask = attention_mask.to(torch.int64)
        if outputs == "cls":
            return Encoded((), self._run("text_cls", input_ids, int_mask)[0])
        *layers, cls = self._run("text", input_ids, int_mask)
        return Encoded(tuple(layers), cls, mask)

    def cache_image(self, encoded: Encoded) -> Encoded:
        return encoded  # exported parts share nothing between pairs

    cache_text = cache_image

    def fuse(self, image: Encoded, text: Encoded, outputs: FusionOutputs = "pooled") -> Fused:
        if outputs == "all":
            raise ValueError(
                'outputs="all" is not exported; expected "pooled" or "text", or load with engine="torch"'
            )
        if len(image) != len(text):
            raise ValueError(
                f"{len(image)} images and {len(text)} texts; expected one text per image: index them first"
            )
        mask = text.mask
        if mask is None:
            mask = torch.ones(text.layers[0].shape[:2])
        mask = mask.to(torch.int64)
        name: PartName = "fusion_text" if outputs == "text" else "fusion_pooled"
        (output,) = self._run(name, *image.layers, *text.layers, mask)
        return Fused(**{outputs: output})

    def _run(self, name: PartName, *inputs: Tensor) -> list[Tensor]:
        *layers, last = self._runner.run(name, inputs)
        return [*layers, last.float()]  # heads compute in float32


Run = Callable[[Sequence[Tensor]], list[Tensor]]


class Runner:
    """Runs the parts of one exported folder, in any number of threads, with as many threads as PyTorch has."""

    def __init__(self, engine: EngineName, folder: Path, precision: Precision) -> None:
        self._arguments = (engine, folder, precision)
        self._loaded: dict[PartName, Run] = {}
        self._loading = Lock()

    def __reduce__(self) -> tuple[type[Runner], tuple[EngineName, Path, Precision]]:
        return Runner, self._arguments

    def run(self, name: PartName, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Runs a part, whose inputs and outputs are in the order of `ExportedPart`."""
        with self._loading:
            if name not in self._loaded:
                engine, folder, precision = self._arguments
                self._loaded[name] = LOADERS[engine](folder / f"{name}.onnx", precision)
        return self._loaded[name](inputs)


def load_onnxruntime(path: Path, precision: Precision) -> Run:
    """Loads a graph, whose weights have the precision."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads of one part would spin after its run, and keep those of the next part from the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        arrays = [tensor.contiguous().numpy() for tensor in inputs]
        outputs = session.run(None, dict(zip(names, arrays, strict=True)))
        return [torch.from_numpy(output) for output in outputs]

    return run


def load_openvino(path: Path, precision: Precision) -> Run:
    """Loads a graph, or OpenVINO's files in its place."""
    import openvino

    if path.with_suffix(".xml").exists():
        path = path.with_suffix(".xml")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
    }
    core = openvino.Core()
    model = core.read_model(path)
    _read_keys_by_rows(model)
    # With hidden states in float32, sums with them would be computed in float32.
    if precision == "bf16":
        steps = openvino.preprocess.PrePostProcessor(model)
        for number, port in enumerate(model.inputs):
            if port.any_name.startswith(("image_", "text_")):
                tensor_info = steps.input(number).tensor()
                tensor_info.set_element_type(openvino.Type.bf16)
        for number in range(len(model.outputs)):
            tensor_info = steps.output(number).tensor()
            tensor_info.set_element_type(openvino.Type.bf16)
        model = steps.build()
    with kept_signal_stack():
        compiled = core.compile_model(model, "CPU", settings)

    # NumPy has no bfloat16, so its bits pass as float16.
    def to_openvino(tensor: Tensor, port: Any) -> Any:
        if port.element_type != openvino.Type.bf16:
            return tensor.contiguous().numpy()
        bits = tensor.to(torch.bfloat16).contiguous().view(torch.float16)
        return openvino.Tensor(bits.numpy(), list(tensor.shape), openvino.Type.bf16)

    def from_openvino(array: Any) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if tensor.dtype == torch.float16 else tensor

    # A request holds the inputs and outputs of a call, so that each thread takes its own.
    idle_requests: list[Any] = []

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        try:
            request = idle_requests.pop()
        except IndexError:
            request = compiled.create_infer_request()
        arrays = list(map(to_openvino, inputs, compiled.inputs))
        outputs = request.infer(arrays, share_inputs=True, share_outputs=False)
        idle_requests.append(request)
        return [from_openvino(outputs[port]) for port in compiled.outputs]

    return run


def _read_keys_by_rows(model: Any) -> None:
    """Lets the product of attention read keys by rows, as OpenVINO would copy them for a transposition."""
    from openvino import opset13

    for product in model.get_ops():
        if product.get_type_name() != "MatMul":
            continue
        transpose = product.input_value(1).get_node()
        if transpose.get_type_name() != "Transpose":
            continue
        axes = transpose.input_value(1).get_node()
        if axes.get_type_name() == "Constant" and axes.get_vector().tolist() == [0, 2, 3, 1]:
            keys = opset13.transpose(transpose.input_value(0), opset13.constant([0, 2, 1, 3]))
            scores = opset13.matmul(
                product.input_value(0), keys, transpose_a=False, transpose_b=True
            )
            product.output(0).replace(scores.output(0))


LOADERS: Mapping[EngineName, Callable[[Path, Precision], Run]] = {
    "onnxruntime": load_onnxruntime,
    "openvino": load_openvino,
}


class SignalStack(ctypes.Structure):
    """`stack_t` of Linux (sigaltstack(2))."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def signal_stack() -> SignalStack:
    stack = SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    return stack


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Restores the thread's signal stack after the block.

    OpenVINO installs a stack with every model that it compiles, and restores the previous one when the model goes. If
    models go in another order than they came, a stack remains whose memory is gone, and the next signal, Ctrl-C
    included, kills the process.
    """
    before = signal_stack() if sys.platform == "linux" else None
    try:
        yield
    finally:
        if before is not None:
            ctypes.CDLL(None).sigaltstack(ctypes.byref(before), None)
