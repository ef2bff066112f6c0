"""Exported folders, which are checkpoints with a graph of each part of the model beside them.

ONNX lets a graph name a range of bytes in another file as a tensor, and a safetensors file is such ranges after a
header. So the float32 parts of a model share one copy of its weights, in a file that this package loads as any
checkpoint. Parts in int8 have weights of their own.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import platform
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridgetower.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from bridgetower.checkpoints.checkpoint import code_content, exact_fingerprint
from bridgetower.engines.config import ENGINES, FORMS, EngineName, Form, engines_for
from bridgetower.engines.parts import ExportedPart, Runner, part_names
from bridgetower.extras import is_installed, require
from bridgetower.files import (
    locked,
    new_folder,
    parse_json,
    read_json,
    remove_folder,
    remove_leftovers,
    replacing,
    sha256_of,
    write_json,
)
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.cpu import cpu_info
from bridgetower.model.extensions import Extensions
from bridgetower.progress import counted

MANIFEST = "export.json"
VERSION = 3

_WEIGHTS = "model.safetensors"
_OPSET = 20  # the first with Gelu
_PREFIX = "model."  # of the names of a part's parameters

logger = logging.getLogger(__name__)


def require_engine(form: Form) -> list[EngineName]:
    """Returns the installed engines that read a form, at least one."""
    require("onnx", "onnxscript")
    engines = engines_for(form)
    installed = [engine for engine in engines if is_installed(engine)]
    if not installed:
        require("onnx", *engines)
    return installed


def write_exported(
    checkpoint: Checkpoint, folder: Path, form: Form = "onnx", *, progress: bool = False
) -> dict[str, dict[str, float]]:
    """Writes a checkpoint in float32 with its parts, or nothing if their outputs differ from the model's."""
    engines = require_engine(form)
    spec = FORMS[form]
    tensors = {name: tensor.float() for name, tensor in checkpoint.tensors.items()}
    with new_folder(folder) as temporary:
        # The weights are in one file, to which graphs refer.
        write_checkpoint(replace(checkpoint, tensors=tensors), temporary, shard_bytes=math.inf)
        model = read_checkpoint(temporary, extensions=checkpoint.extensions).model(copy=False)

        # Each part is compared with the model.
        runners = {engine: Runner(engine, temporary, spec.precision) for engine in engines}
        differences: dict[str, dict[str, float]] = {engine: {} for engine in engines}
        for name in counted(part_names(model), "exporting parts", enabled=progress):
            exported_part = ExportedPart(model, name)
            WRITERS[form](exported_part, temporary / f"{name}.onnx")
            for engine, runner in runners.items():
                difference = _largest_difference(exported_part, partial(runner.run, name))
                if difference > spec.tolerance:
                    raise ValueError(
                        f"part {name} in {engine} differs from the model by {difference:.1e}; expected at most "
                        f"{spec.tolerance:.0e}: use engine torch"
                    )
                differences[engine][name] = difference

        # The manifest names all files with their digests.
        files = [file for file in temporary.iterdir() if file.suffix in (".onnx", ".xml", ".bin")]
        manifest = {
            "version": VERSION,
            "form": form,
            "signed": form == "onnx-int8" and not products_overflow(),
            "weights": weights_fingerprint(temporary, form),
            "parts": {file.name: sha256_of(file) for file in sorted(files)},
            "largest_difference": differences,
        }
        write_json(temporary / MANIFEST, manifest)
    return differences


def _largest_difference(
    exported_part: ExportedPart, run: Callable[[Sequence[Tensor]], list[Tensor]]
) -> float:
    """Returns the largest difference of outputs from the model's, over examples of several sizes."""
    largest = 0.0
    for inputs in exported_part.examples():
        with torch.no_grad():
            expected = exported_part(*inputs)
        for output, reference in zip(run(inputs), expected, strict=True):
            scale = reference.abs().max().clamp(min=1)
            difference = (output - reference).abs().max() / scale
            largest = max(largest, float(difference.nan_to_num(torch.inf)))
    return largest


def is_exported(folder: Path, engine: EngineName, form: Form) -> bool:
    """Whether a folder has parts in the form, or in another one that the engine reads."""
    forms = (form, *ENGINES[engine].also_reads)
    return (folder / MANIFEST).is_file() and read_json(folder / MANIFEST).get("form") in forms


def exported_model(folder: Path, extensions: Extensions) -> BridgeTower:
    """Checks the files of an exported folder and returns its model."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{folder} was exported as version {manifest.get('version')}; this release reads {VERSION}"
        )
    try:
        is_signed = manifest["signed"]
        digests = {folder / name: digest for name, digest in manifest["parts"].items()}
        form = manifest["form"]
        weights = manifest["weights"]
    except (KeyError, AttributeError) as error:
        raise ValueError(
            f"{folder / MANIFEST} is not what was exported ({error}); export the model again"
        ) from error
    if is_signed and products_overflow():
        raise ValueError(
            f"{folder} has int8 weights for processors with VNNI, unlike this one; export it again here"
        )
    for path, digest in digests.items():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; export the model again")
        if sha256_of(path) != digest:
            raise ValueError(f"{path} is not what was exported; export the model again")
    if weights_fingerprint(folder, form) != weights:
        raise ValueError(
            f"{folder / _WEIGHTS} is not what its parts were exported of; export the model again"
        )
    return read_checkpoint(folder, extensions=extensions).model(copy=False)


def cached_export(
    checkpoint: Checkpoint, cache: Path, form: Form, *, progress: bool = False
) -> tuple[Path, BridgeTower]:
    """Returns the folder in `cache` with the parts of a checkpoint and its model, exported if need be."""
    # Processors with and without VNNI may share a cache.
    suffix = "-unsigned" if form == "onnx-int8" and products_overflow() else ""
    folder = cache / f"{content_key(checkpoint)}-{form}{suffix}"
    with locked(cache, wait=True):
        if folder.exists():
            try:
                return folder, exported_model(folder, checkpoint.extensions)
            except (FileNotFoundError, ValueError) as error:
                logger.warning(
                    "%s is damaged (%s); it is removed and exported again", folder, error
                )
                remove_folder(folder)
        # Temporary folders of other exports may belong to live processes.
        remove_leftovers(cache, folder.name)
        logger.info("%s: exporting it for this engine, once, to %s", checkpoint.source, folder)
        write_exported(checkpoint, folder, form, progress=progress)
        return folder, exported_model(folder, checkpoint.extensions)


def content_key(checkpoint: Checkpoint) -> str:
    """Returns a digest of the config, the weights and the code of a checkpoint."""
    model = checkpoint.model(copy=False)
    extensions = checkpoint.extensions
    builders = {
        *extensions.vision_towers.values(),
        *extensions.text_towers.values(),
        *extensions.bridges.values(),
    }
    folders = [Path(inspect.getfile(BridgeTower)).parent, Path(__file__).parent]
    code = code_content(
        {*map(type, model.modules()), *filter(inspect.isfunction, builders)},
        [file for folder in folders for file in folder.glob("*.py")],
    )
    weights = exact_fingerprint(checkpoint.tensors)
    content = [VERSION, checkpoint.config.to_dict(), part_names(model), code, weights]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def products_overflow() -> bool:
    """Whether products of signed int8 weights overflow on this processor: on x86 without VNNI."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return {"avx512_vnni", "avx_vnni"}.isdisjoint(cpu_info().get("flags", "").split())


def write_graph(exported_part: ExportedPart, path: Path) -> None:
    """Writes the graph of a part, which names its weights in the checkpoint beside it."""
    import onnx_ir as ir
    from onnxscript.optimizer import optimize_ir

    # Tensors computed of weights would be stored in the graph.
    def should_fold(node: Any) -> bool | None:
        has_weights = any(value is not None and value.is_initializer() for value in node.inputs)
        return False if has_weights else None

    model = _graph(exported_part, optimize=False).model
    optimize_ir(model, should_fold=should_fold)

    # Constants that no checkpoint holds stay in the graph.
    ranges = tensor_ranges(path.with_name(_WEIGHTS))
    for name, value in model.graph.initializers.items():
        byte_range = ranges.get(name.removeprefix(_PREFIX))
        if byte_range is not None:
            offset, length = byte_range
            value.const_value = ir.ExternalTensor(
                _WEIGHTS,
                offset,
                length,
                value.dtype,
                shape=value.shape,
                name=name,
                base_dir=path.parent,
            )
    _split_products(model)
    with replacing(path) as temporary:
        ir.save(model, temporary)


def _split_products(model: Any) -> None:
    """Splits the weights of a linear layer instead of its output, which engines would copy."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph = model.graph
    for split in [node for node in graph if node.op_type == "Split"]:
        # The linear layer before a split, with weights in a file and equal pieces of their rows.
        layer = _linear_layer(split)
        if layer is None:
            continue
        hidden, weight, bias = layer
        stored = [
            value for value in (weight, bias) if isinstance(value.const_value, ir.ExternalTensor)
        ]
        count = len(split.outputs)
        width = bias.shape[0] // count
        axis = split.attributes["axis"].value
        last_axis = len(split.inputs[0].shape) - 1
        if len(stored) < 2 or axis not in (-1, last_axis):
            continue
        if any(output.shape[-1] != width or output.is_graph_output() for output in split.outputs):
            continue

        # A layer for each output, with ranges of the bytes of weight and bias.
        for number, output in enumerate(split.outputs):
            pieces = []
            for value in stored:
                tensor = _tensor_rows(value, number, count)
                piece = ir.Value(
                    name=tensor.name, shape=tensor.shape, type=value.type, const_value=tensor
                )
                pieces.append(graph.initializers.setdefault(tensor.name, piece))
            transposed = ir.node("Transpose", pieces[:1], {"perm": [1, 0]})
            product = ir.node("MatMul", [hidden, transposed.outputs[0]])
            added = ir.node("Add", [product.outputs[0], pieces[1]])
            graph.insert_before(split, [transposed, product, added])
            ir.convenience.replace_all_uses_with(output, added.outputs[0])
        graph.remove(split, safe=True)
    RemoveUnusedNodesPass()(model)


def _linear_layer(split: Any) -> tuple[Any, Any, Any] | None:
    """Returns the input, the weight and the bias of the linear layer before a node, if there is one."""
    add = split.inputs[0].producer()
    if add is None or add.op_type != "Add":
        return None
    product = add.inputs[0].producer()
    if product is None or product.op_type != "MatMul":
        return None
    transpose = product.inputs[1].producer()
    if transpose is None or transpose.op_type != "Transpose":
        return None
    return product.inputs[0], transpose.inputs[0], add.inputs[1]


def _tensor_rows(value: Any, index: int, count: int) -> Any:
    """Returns piece `index`, from 0, of `count` equal pieces of the rows of a stored tensor."""
    import onnx_ir as ir

    tensor = value.const_value
    num_bytes = tensor.length // count
    return ir.ExternalTensor(
        tensor.location,
        tensor.offset + index * num_bytes,
        num_bytes,
        value.dtype,
        shape=ir.Shape([value.shape[0] // count, *value.shape[1:]]),
        name=f"{value.name}.{index}",
        base_dir=tensor.base_dir,
    )


def write_openvino(exported_part: ExportedPart, path: Path) -> None:
    """Writes a part as OpenVINO's files with weights in place of a graph."""
    import openvino

    write_graph(exported_part, path)
    model = openvino.Core().read_model(path)
    openvino.save_model(model, path.with_suffix(".xml"), compress_to_fp16=False)
    path.unlink()


def write_int8_graph(exported_part: ExportedPart, path: Path) -> None:
    """Writes the graph of a part with weights, those of linear layers in int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Only weights that are direct inputs of a product are quantised, so the graph is optimised first.
    program = _graph(exported_part, optimize=True)
    program.model.metadata_props["onnx.quant.pre_process"] = "onnxruntime.quant"
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch, replacing(path) as temporary:
        program.save(Path(scratch) / "part.onnx", external_data=True)
        quantize_dynamic(
            Path(scratch) / "part.onnx",
            temporary,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QUInt8 if products_overflow() else QuantType.QInt8,
        )


WRITERS: Mapping[Form, Callable[[ExportedPart, Path], None]] = {
    "onnx": write_graph,
    "onnx-int8": write_int8_graph,
    "openvino": write_openvino,
}


def _graph(exported_part: ExportedPart, *, optimize: bool) -> Any:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with warnings.catch_warnings():
        # The exporter warns of its own code.
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            exported_part.exported(),
            dynamo=True,
            verbose=False,
            optimize=optimize,
            opset_version=_OPSET,
            input_names=list(exported_part.dynamic),
            output_names=exported_part.output_names,
        )
    # Metadata name files of this machine.
    ClearMetadataAndDocStringPass()(program.model)
    return program


def weights_fingerprint(folder: Path, form: Form) -> str:
    """Returns a digest of the weights on which parts rely: of their header if graphs refer to it, else of all bytes."""
    path = folder / _WEIGHTS
    if form != "onnx":
        return sha256_of(path)
    return hashlib.sha256(json.dumps(_header(path), sort_keys=True).encode()).hexdigest()


def tensor_ranges(weights: Path) -> dict[str, tuple[int, int]]:
    """Returns the first byte and the number of bytes of each tensor of a safetensors file."""
    first, header = _header(weights)
    ranges = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        ranges[name] = (first + start, end - start)
    return ranges


def _header(weights: Path) -> tuple[int, dict[str, Any]]:
    """Returns the position of the first byte after the header, and the entries of the header."""
    with weights.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(size), f"the header of {weights}")
    # Metadata may hold a checksum of the numbers.
    header.pop("__metadata__", None)
    return 8 + size, header
