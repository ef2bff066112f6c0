"""Exported folders: a checkpoint with an ONNX graph per part beside it, compared with the model before it is used.

ONNX lets a graph name a range of bytes in another file as a tensor, and a safetensors file is such ranges after a
header. So the float32 parts of a model share one copy of its weights, in a file that this package loads as any
checkpoint. Parts in int8 have their own.
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
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from bridgetower.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from bridgetower.checkpoints.checkpoint import code_content, exact_fingerprint
from bridgetower.engines.config import FORMS, TOLERANCES, EngineName, Form, Precision
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


def installed_engines(form: Form) -> tuple[Precision, list[EngineName]]:
    """Returns in which precision an export gives the model's numbers, and the installed engines that run it so."""
    require("onnx", "onnxscript")
    precision: Precision = "int8" if form == "onnx-int8" else "fp32"
    able = [
        engine for engine in get_args(EngineName) if FORMS.get((engine, precision)) == form
    ] or ["openvino"]
    if not any(map(is_installed, able)):
        require("onnx", *able)
    return precision, [engine for engine in able if is_installed(engine)]


def write_exported(
    checkpoint: Checkpoint, folder: Path, form: Form = "onnx", *, progress: bool = False
) -> dict[str, dict[str, float]]:
    """Writes a checkpoint in float32 with its parts, compared with the model; nothing is left if they differ."""
    precision, engines = installed_engines(form)
    tensors = {name: tensor.float() for name, tensor in checkpoint.tensors.items()}
    signed = form == "onnx-int8" and not products_overflow()
    with new_folder(folder) as temporary:
        write_checkpoint(
            replace(checkpoint, tensors=tensors), temporary, shard_bytes=math.inf
        )  # graphs refer to it
        model = read_checkpoint(temporary, extensions=checkpoint.extensions).model(copy=False)
        runners = {engine: Runner(engine, temporary, precision) for engine in engines}
        differences: dict[str, dict[str, float]] = {engine: {} for engine in runners}
        names = part_names(model)
        for name in counted(names, "exporting parts", enabled=progress):
            part = ExportedPart(model, name)
            path = temporary / f"{name}.onnx"
            if form == "onnx-int8":
                write_int8_graph(part, path, signed=signed)
            else:
                write_graph(part, path, temporary / _WEIGHTS)
            if form == "openvino":
                write_ir(path)
            for engine, runner in runners.items():
                off = 0.0  # from the model, over examples of several sizes
                for inputs in part.examples():
                    with torch.no_grad():
                        expected = part(*inputs)
                    outputs = runner.run(name, inputs)
                    for output, wanted in zip(outputs, expected, strict=True):
                        difference = (output - wanted).abs().max() / wanted.abs().max().clamp(min=1)
                        off = max(off, float(difference.nan_to_num(torch.inf)))
                if off > TOLERANCES[form]:
                    raise ValueError(
                        f"part {name} in {engine} differs from the model by {off:.1e}; expected at most "
                        f"{TOLERANCES[form]:.0e}: use engine torch"
                    )
                differences[engine][name] = off
        manifest = {
            "version": VERSION,
            "form": form,
            "signed": signed,
            "weights": weights_fingerprint(temporary, form),
        }
        files = [
            file for suffix in ("onnx", "xml", "bin") for file in temporary.glob(f"*.{suffix}")
        ]
        parts = {file.name: sha256_of(file) for file in sorted(files)}
        write_json(
            temporary / MANIFEST, {**manifest, "parts": parts, "largest_difference": differences}
        )
    return differences


def is_exported(folder: Path, engine: EngineName, form: Form) -> bool:
    """Whether a folder has parts that an engine runs: of a form, or for OpenVINO of its own."""
    forms = (form, "openvino") if engine == "openvino" else (form,)
    return (folder / MANIFEST).is_file() and read_json(folder / MANIFEST).get("form") in forms


def exported_model(folder: Path, extensions: Extensions) -> BridgeTower:
    """Returns the model of an exported folder, whose parts are whole, and of the weights that are there."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{folder} was exported as version {manifest.get('version')}; this release reads {VERSION}"
        )
    try:
        signed, parts, form, weights = (
            manifest[name] for name in ("signed", "parts", "form", "weights")
        )
        digests = {folder / name: digest for name, digest in parts.items()}
    except (KeyError, AttributeError) as error:
        raise ValueError(
            f"{folder / MANIFEST} is not what was exported ({error}); export the model again"
        ) from error
    if signed and products_overflow():
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
    """Returns the folder in `cache` with the parts of a checkpoint and its model; exports it if need be."""
    unsigned = (
        form == "onnx-int8" and products_overflow()
    )  # processors with and without VNNI may share a cache
    folder = cache / f"{content_key(checkpoint)}-{form}{'-unsigned' * unsigned}"
    with locked(cache, wait=True):
        if folder.exists():
            try:
                return folder, exported_model(folder, checkpoint.extensions)
            except (FileNotFoundError, ValueError) as error:
                logger.warning(
                    "%s is damaged (%s); it is removed and exported again", folder, error
                )
                remove_folder(folder)
        remove_leftovers(cache, folder.name)  # others in the cache may belong to live processes
        logger.info("%s: exporting it for this engine, once, to %s", checkpoint.source, folder)
        write_exported(checkpoint, folder, form, progress=progress)
        return folder, exported_model(folder, checkpoint.extensions)


def content_key(checkpoint: Checkpoint) -> str:
    """Returns a name that checkpoints share if their config, their weights and all code of their parts are equal."""
    model, own = checkpoint.model(copy=False), checkpoint.extensions
    builders = {*own.vision_towers.values(), *own.text_towers.values(), *own.bridges.values()}
    code = code_content(
        {*map(type, model.modules()), *filter(inspect.isfunction, builders)},
        [
            file
            for place in (inspect.getfile(BridgeTower), __file__)
            for file in Path(place).parent.glob("*.py")
        ],
    )
    weights = exact_fingerprint(checkpoint.tensors)
    content = [VERSION, checkpoint.config.to_dict(), part_names(model), code, weights]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def products_overflow() -> bool:
    """Whether products of signed int8 weights overflow on this processor: on x86 without VNNI."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return {"avx512_vnni", "avx_vnni"}.isdisjoint(cpu_info().get("flags", "").split())


def write_graph(part: ExportedPart, path: Path, weights: Path) -> None:
    import onnx_ir as ir
    from onnxscript.optimizer import optimize_ir

    model = _graph(part, optimize=False).model

    def should_fold(
        node: Any,
    ) -> bool | None:  # computed in advance, weights would be stored in the graph
        return (
            False
            if any(value is not None and value.is_initializer() for value in node.inputs)
            else None
        )

    optimize_ir(model, should_fold=should_fold)
    ranges = tensor_ranges(weights)
    for name, value in model.graph.initializers.items():
        if (
            place := ranges.get(name.removeprefix(_PREFIX))
        ) is not None:  # else a constant that no checkpoint holds
            offset, length = place
            value.const_value = ir.ExternalTensor(
                weights.name,
                offset,
                length,
                value.dtype,
                shape=value.shape,
                name=name,
                base_dir=weights.parent,
            )
    _split_products(model)
    with replacing(path) as temporary:
        ir.save(model, temporary)


def _split_products(model: Any) -> None:
    """Makes a linear layer whose output is split several, with pieces of its weight: engines would copy the output."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph = model.graph
    for split in [node for node in graph if node.op_type == "Split"]:
        layer = [split]
        for place, kind in ((0, "Add"), (0, "MatMul"), (1, "Transpose")):
            before = layer[-1].inputs[place].producer()
            if before is None or before.op_type != kind:
                break
            layer.append(before)
        if len(layer) < 4:
            continue
        _, add, product, turned = layer
        wholes, count = (turned.inputs[0], add.inputs[1]), len(split.outputs)
        if not all(isinstance(whole.const_value, ir.ExternalTensor) for whole in wholes):
            continue
        width = wholes[1].shape[0] // count
        if split.attributes["axis"].value not in (-1, len(split.inputs[0].shape) - 1) or any(
            output.shape[-1] != width or output.is_graph_output() for output in split.outputs
        ):
            continue
        for number, output in enumerate(split.outputs):
            pieces = []
            for whole in wholes:
                stored, name = whole.const_value, f"{whole.name}.{number}"
                length = stored.length // count
                tensor = ir.ExternalTensor(
                    stored.location,
                    stored.offset + number * length,
                    length,
                    whole.dtype,
                    shape=ir.Shape([whole.shape[0] // count, *whole.shape[1:]]),
                    name=name,
                    base_dir=stored.base_dir,
                )
                piece = ir.Value(name=name, shape=tensor.shape, type=whole.type, const_value=tensor)
                pieces.append(graph.initializers.setdefault(name, piece))
            weight = ir.node("Transpose", pieces[:1], {"perm": [1, 0]})
            multiplied = ir.node("MatMul", [product.inputs[0], weight.outputs[0]])
            added = ir.node("Add", [multiplied.outputs[0], pieces[1]])
            graph.insert_before(split, [weight, multiplied, added])
            ir.convenience.replace_all_uses_with(output, added.outputs[0])
        graph.remove(split, safe=True)
    RemoveUnusedNodesPass()(model)


def write_ir(graph: Path) -> None:
    """Writes a graph as OpenVINO's own files, weights included, in its place."""
    import openvino

    openvino.save_model(
        openvino.Core().read_model(graph), graph.with_suffix(".xml"), compress_to_fp16=False
    )
    graph.unlink()


def write_int8_graph(part: ExportedPart, path: Path, *, signed: bool) -> None:
    """Writes a part with linear layers in int8, weights included."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    program = _graph(part, optimize=True)  # only weights that stand beside their product are found
    # or it asks for just that
    program.model.metadata_props["onnx.quant.pre_process"] = "onnxruntime.quant"
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch, replacing(path) as temporary:
        program.save(Path(scratch) / "part.onnx", external_data=True)
        quantize_dynamic(
            Path(scratch) / "part.onnx",
            temporary,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8 if signed else QuantType.QUInt8,
        )


def _graph(part: ExportedPart, *, optimize: bool) -> Any:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own parts
        program: Any = torch.onnx.export(
            part.exported(),
            dynamo=True,
            verbose=False,
            optimize=optimize,
            opset_version=_OPSET,
            input_names=list(part.dynamic),
            output_names=part.output_names,
        )
    ClearMetadataAndDocStringPass()(program.model)  # it names files of this machine
    return program


def weights_fingerprint(folder: Path, form: Form) -> str:
    """Returns what ties parts to the weights: names, formats, shapes and places if graphs read them, else all bytes."""
    if form != "onnx":
        return sha256_of(folder / _WEIGHTS)
    return hashlib.sha256(
        json.dumps(_header(folder / _WEIGHTS), sort_keys=True).encode()
    ).hexdigest()


def tensor_ranges(weights: Path) -> dict[str, tuple[int, int]]:
    """Returns where the tensors of a safetensors file lie: first byte and number of bytes."""
    first, header = _header(weights)
    places = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (first + start, end - start) for name, (start, end) in places.items()}


def _header(weights: Path) -> tuple[int, dict[str, Any]]:
    with weights.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(size), f"the header of {weights}")
    header.pop("__metadata__", None)  # which may hold a checksum of the numbers
    return 8 + size, header
