"""Parts as ONNX graphs that hold no weights: these stay in the checkpoint's safetensors file beside them.

ONNX lets a graph name a range of bytes in another file as a tensor, and a safetensors file is such ranges after a
header. So all parts of a model share one copy of its weights, in a file that this package loads as any checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from bridgetower.engines.packages import require
from bridgetower.engines.parts import Part
from bridgetower.files import replacing

_OPSET = 20  # the first with Gelu
_PREFIX = "model."  # of the names of a part's parameters


def write_graph(part: Part, path: Path, weights: Path) -> None:
    """Writes a part as an ONNX graph.

    Args:
        part: What to write.
        path: Of the graph.
        weights: Safetensors file in the same folder, with every parameter of the part, as float32.

    Raises:
        FileNotFoundError: The packages for it are not installed.
    """
    require("onnxscript", extra="onnx")
    import onnx_ir as ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own parts
        program: Any = torch.onnx.export(
            part.exported(),
            dynamo=True,
            verbose=False,
            optimize=False,  # it would turn weights round, and store them so in the graph; engines do it in memory
            opset_version=_OPSET,
            input_names=list(part.input_names),
            output_names=list(part.output_names),
        )
    ranges = tensor_ranges(weights)
    for name, value in program.model.graph.initializers.items():
        if name.startswith(_PREFIX):
            offset, length = ranges[name.removeprefix(_PREFIX)]
            value.const_value = ir.ExternalTensor(
                weights.name, offset, length, value.dtype, shape=value.shape, name=name, base_dir=weights.parent
            )
    ClearMetadataAndDocStringPass()(program.model)  # it names files of this machine
    with replacing(path) as temporary:
        ir.save(program.model, temporary)


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
    return hashlib.sha256(json.dumps([first, header], sort_keys=True).encode()).hexdigest()


def _header(weights: Path) -> tuple[dict[str, Any], int]:
    """Returns the header of a safetensors file and where its tensors begin."""
    with weights.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size
