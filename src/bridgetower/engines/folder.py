"""Exported folders: a checkpoint with a graph per part beside it, compared with the model before it gets its name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from bridgetower.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from bridgetower.engines.onnx_graphs import layout, write_graph
from bridgetower.engines.onnxruntime_runner import OnnxRuntimeRunner
from bridgetower.engines.parts import Part, flat, make_part, part_names
from bridgetower.engines.runner import Runner
from bridgetower.files import new_folder, read_json, write_json

MANIFEST = "export.json"
TOLERANCE = 1e-4

_WEIGHTS = "model.safetensors"
VERSION = 1


def write_exported(checkpoint: Checkpoint, folder: Path, *, progress: bool = False) -> dict[str, float]:
    """Writes a checkpoint in float32 with its parts, compared with the model; nothing is left if they differ.

    Args:
        checkpoint: What to export.
        folder: New or empty.
        progress: Show a bar.

    Returns:
        Part → largest difference of its outputs, as a share of their largest value where that is above one.

    Raises:
        FileExistsError: The folder holds something else.
        FileNotFoundError: Packages are not installed.
        ValueError: An engine's outputs differ from the model's.
    """
    tensors = {name: tensor.float() for name, tensor in checkpoint.tensors.items()}
    with new_folder(folder) as temporary:
        write_checkpoint(replace(checkpoint, tensors=tensors), temporary)
        model, runner = read_checkpoint(temporary).model(), OnnxRuntimeRunner(temporary)
        names = part_names(checkpoint.config)
        differences: dict[str, float] = {}
        for name in track(names, "parts", console=Console(stderr=True)) if progress else names:
            part = make_part(model, name)
            write_graph(part, temporary / f"{name}.onnx", temporary / _WEIGHTS)
            differences[name] = _compared(part, runner)
        write_json(temporary / MANIFEST, _manifest(temporary, differences))
    return differences


def is_exported(folder: Path) -> bool:
    """Whether a folder holds exported parts."""
    return (folder / MANIFEST).is_file()


def check_exported(folder: Path) -> None:
    """Checks that the parts of a folder are whole, and were exported of the weights that are there.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file was damaged or exchanged.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.get("version") != VERSION:
        raise ValueError(f"{folder} was exported as version {manifest.get('version')}; this release reads {VERSION}")
    for name, digest in manifest["parts"].items():
        path = folder / f"{name}.onnx"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; export the model again")
        if _digest(path) != digest:
            raise ValueError(f"{path} is not what was exported; export the model again")
    if layout(folder / _WEIGHTS) != manifest["layout"]:
        raise ValueError(f"{folder / _WEIGHTS} is not laid out as when its parts were exported; export it again")


def _manifest(folder: Path, differences: Mapping[str, float]) -> dict[str, Any]:
    return {
        "version": VERSION,
        "layout": layout(folder / _WEIGHTS),
        "parts": {name: _digest(folder / f"{name}.onnx") for name in differences},
        "largest_difference": dict(differences),
    }


def _compared(part: Part, runner: Runner) -> float:
    """Returns how far an engine's outputs are from the model's, over examples of several sizes."""
    largest = 0.0
    for inputs in part.examples():
        with torch.no_grad():
            expected = part.module(*inputs)
        outputs = runner.run(part.name, [tensor.numpy() for tensor in flat(inputs)])
        for output, wanted in zip(outputs, expected, strict=True):
            off = (torch.from_numpy(output) - wanted).abs().max() / wanted.abs().max().clamp(min=1)
            largest = max(largest, float(off))
    if not largest <= TOLERANCE:
        raise ValueError(
            f"part {part.name} differs from the model by {largest:.1e}; expected at most {TOLERANCE:.0e}: "
            "use engine torch"
        )
    return largest


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
