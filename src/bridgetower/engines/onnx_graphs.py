"""Parts as ONNX graphs: in float32 without weights, in int8 with their own.

ONNX lets a graph name a range of bytes in another file as a tensor, and a safetensors file is such ranges after a
header. So the float32 parts of a model share one copy of its weights, in a file that this package loads as any
checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from bridgetower.engines.parts import Part
from bridgetower.extras import require
from bridgetower.files import parse_json, replacing
from bridgetower.model.products import cpu_info

_OPSET = 20  # the first with Gelu
_PREFIX = "model."  # of the names of a part's parameters


def write_graph(part: Part, path: Path, weights: Path) -> None:
    """Writes a part as an ONNX graph of float32."""
    require("onnx", "onnxscript")
    import onnx_ir as ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript.optimizer import optimize_ir

    model = _converted(part, optimize=False).model

    def should_fold(node: Any) -> bool | None:  # computed in advance, weights would be stored in the graph
        return False if any(value is not None and value.is_initializer() for value in node.inputs) else None

    optimize_ir(model, should_fold=should_fold)
    ranges = tensor_ranges(weights)
    for name, value in model.graph.initializers.items():
        if (place := ranges.get(name.removeprefix(_PREFIX))) is not None:  # else a constant that no checkpoint holds
            offset, length = place
            value.const_value = ir.ExternalTensor(
                weights.name, offset, length, value.dtype, shape=value.shape, name=name, base_dir=weights.parent
            )
    ClearMetadataAndDocStringPass()(model)  # it names files of this machine
    with replacing(path) as temporary:
        ir.save(model, temporary)


def products_overflow() -> bool:
    """Whether products of signed int8 weights overflow on this processor: on x86 without VNNI."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return {"avx512_vnni", "avx_vnni"}.isdisjoint(cpu_info().get("flags", "").split())


def write_int8_graph(part: Part, path: Path, *, signed: bool) -> None:
    """Writes a part with linear layers in int8, weights included.

    Weights get a scale per output channel; inputs are scaled when the part runs, by their largest and smallest value
    (ONNX Runtime's dynamic quantisation). Attention, norms and embeddings stay in float32.
    """
    require("onnx", "onnxscript", "onnxruntime")
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxruntime.quantization import QuantType, quantize_dynamic

    program = _converted(part, optimize=True)  # only weights that stand beside their product are found
    ClearMetadataAndDocStringPass()(program.model)
    program.model.metadata_props["onnx.quant.pre_process"] = "onnxruntime.quant"  # or it asks for just that
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch, replacing(path) as temporary:
        program.save(Path(scratch) / "part.onnx", external_data=True)
        quantize_dynamic(
            Path(scratch) / "part.onnx",
            temporary,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8 if signed else QuantType.QUInt8,
        )


def tensor_ranges(weights: Path) -> dict[str, tuple[int, int]]:
    """Returns where the tensors of a safetensors file lie: first byte and number of bytes."""
    header, first = _header(weights)
    return {
        name: (first + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def layout(weights: Path) -> str:
    """Returns a fingerprint of what graphs take for granted of a weights file: names, formats, shapes and places."""
    header, first = _header(weights)
    header["__metadata__"] = {"format": "pt"}  # whatever it is: it may hold a checksum of the numbers
    return hashlib.sha256(json.dumps([first, header], sort_keys=True).encode()).hexdigest()


def _converted(part: Part, *, optimize: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own parts
        return torch.onnx.export(
            part.exported(),
            dynamo=True,
            verbose=False,
            optimize=optimize,
            opset_version=_OPSET,
            input_names=list(part.input_names),
            output_names=list(part.output_names),
        )


def _header(weights: Path) -> tuple[dict[str, Any], int]:
    with weights.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return parse_json(file.read(size), f"the header of {weights}"), 8 + size
