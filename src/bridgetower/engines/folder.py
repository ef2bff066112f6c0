"""Exported folders: a checkpoint with a file per part beside it, compared with the model before it gets its name."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from bridgetower.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from bridgetower.engines.config import FORMS, TOLERANCES, EngineName, Form, Precision
from bridgetower.engines.onnx_graphs import layout, products_overflow, write_graph, write_int8_graph
from bridgetower.engines.parts import Part, flat, make_part, part_names
from bridgetower.engines.runners import Runner, make_runner
from bridgetower.extras import is_installed, require
from bridgetower.files import new_folder, read_json, sha256_of, write_json
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.extensions import Extensions
from bridgetower.progress import counted

MANIFEST = "export.json"
VERSION = 2

_WEIGHTS = "model.safetensors"


def write_exported(
    checkpoint: Checkpoint, folder: Path, form: Form = "onnx", *, progress: bool = False
) -> dict[str, dict[str, float]]:
    """Writes a checkpoint in float32 with its parts, compared with the model; nothing is left if they differ."""
    tensors = {name: tensor.float() for name, tensor in checkpoint.tensors.items()}
    signed = form == "onnx-int8" and not products_overflow()
    with new_folder(folder) as temporary:
        write_checkpoint(replace(checkpoint, tensors=tensors), temporary, shard_bytes=math.inf)  # graphs refer to it
        model = read_checkpoint(temporary, extensions=checkpoint.extensions).model(copy=False)
        require("onnx", "onnxscript")
        able: dict[EngineName, Precision] = {}  # the precision in which each is to give the model's numbers
        for (engine, precision), runs in FORMS.items():
            if runs == form:
                able.setdefault(engine, precision)
        if not any(map(is_installed, able)):
            require("onnx", *able)
        runners = {engine: make_runner(engine, temporary, able[engine]) for engine in able if is_installed(engine)}
        differences: dict[str, dict[str, float]] = {engine: {} for engine in runners}
        names = part_names(model)
        for name in counted(names, "exporting parts", shown=progress):
            part = make_part(model, name)
            if form == "onnx":
                write_graph(part, temporary / f"{name}.onnx", temporary / _WEIGHTS)
            else:
                write_int8_graph(part, temporary / f"{name}.onnx", signed=signed)
            for engine, runner in runners.items():
                differences[engine][name] = _compared(part, engine, runner, TOLERANCES[form])
        manifest = {
            "version": VERSION,
            "form": form,
            "weights": _fingerprint(temporary, form),
            "parts": {name: sha256_of(temporary / f"{name}.onnx") for name in names},
            "signed": signed,
            "largest_difference": differences,  # of each engine's part from the model
        }
        write_json(temporary / MANIFEST, manifest)
    return differences


def is_exported(folder: Path, form: Form) -> bool:
    """Whether a folder holds exported parts of a form."""
    return (folder / MANIFEST).is_file() and read_json(folder / MANIFEST).get("form") == form


def check_exported(folder: Path) -> None:
    """Checks that the parts of a folder are whole, and were exported of the weights that are there."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("version") != VERSION:
        raise ValueError(f"{folder} was exported as version {manifest.get('version')}; this release reads {VERSION}")
    try:
        signed, parts, form, weights = (manifest[name] for name in ("signed", "parts", "form", "weights"))
        digests = {folder / f"{name}.onnx": digest for name, digest in parts.items()}
    except (KeyError, AttributeError) as error:
        raise ValueError(f"{folder / MANIFEST} is not what was exported ({error}); export the model again") from error
    if signed and products_overflow():
        raise ValueError(f"{folder} has int8 weights for processors with VNNI, unlike this one; export it again here")
    for path, digest in digests.items():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; export the model again")
        if sha256_of(path) != digest:
            raise ValueError(f"{path} is not what was exported; export the model again")
    if _fingerprint(folder, form) != weights:
        raise ValueError(f"{folder / _WEIGHTS} is not what its parts were exported of; export the model again")


def exported_model(folder: Path, extensions: Extensions) -> BridgeTower:
    """Returns the model of an exported folder, after `check_exported`."""
    check_exported(folder)
    return read_checkpoint(folder, extensions=extensions).model(copy=False)


def _fingerprint(folder: Path, form: Form) -> str:
    """Returns what ties the parts to the weights: where these lie for graphs that read them there, else their bytes."""
    return layout(folder / _WEIGHTS) if form == "onnx" else sha256_of(folder / _WEIGHTS)


def _compared(part: Part, engine: str, runner: Runner, tolerance: float) -> float:
    """Returns how far an engine's outputs are from the model's, over examples of several sizes."""
    largest = 0.0
    for inputs in part.examples():
        with torch.no_grad():
            expected = part.module(*inputs)
        outputs = runner.run(part.name, [value.numpy() for value in flat(inputs)])
        for output, wanted in zip(outputs, expected, strict=True):
            off = (torch.from_numpy(output) - wanted).abs().max() / wanted.abs().max().clamp(min=1)
            largest = max(largest, float(off))
    if not largest <= tolerance:
        raise ValueError(
            f"part {part.name} in {engine} differs from the model by {largest:.1e}; expected at most "
            f"{tolerance:.0e}: use engine torch"
        )
    return largest
