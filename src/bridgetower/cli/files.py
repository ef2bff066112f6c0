"""Verbs that make files from a model's files: convert and export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from bridgetower.cli.options import Model
from bridgetower.cli.output import emit
from bridgetower.engines.config import Form


def convert(
    source: Positional[str],
    destination: Positional[Path],
    *,
    to: Literal["bridgetower", "hf"],
    tokenizer: Path | None = None,
    answers: Path | None = None,
    image_size: int | None = None,
    revision: str | None = None,
    drop_itc: bool = False,
) -> None:
    """Convert a checkpoint to a folder of this package or of transformers.

    Example: bridgetower convert official.ckpt my-model --to bridgetower --tokenizer roberta-base/

    Args:
        source: Hub id, folder, or official .ckpt.
        destination: New folder.
        to: bridgetower, or hf for transformers' from_pretrained.
        tokenizer: Folder or file with a tokenizer, for an official .ckpt.
        answers: JSON file with the list of answers, for an official .ckpt with a VQA head.
        image_size: Resize the position embeddings to this many pixels.
        revision: Branch, tag or commit of a hub id.
        drop_itc: Leave the contrastive head out; transformers cannot hold the official kind.
    """
    from bridgetower.checkpoints import convert as write_converted
    from bridgetower.checkpoints import read_checkpoint

    checkpoint = read_checkpoint(source, revision=revision, tokenizer=tokenizer, answers=answers)
    if image_size is not None:
        checkpoint = checkpoint.resized(image_size)
    write_converted(checkpoint, destination, to, drop_itc=drop_itc)
    emit({"written": str(destination), "format": to, "not_used": list(checkpoint.dropped)})


def export(
    model: Positional[Model],
    destination: Positional[Path],
    *,
    form: Annotated[Form, arg(name="format")] = "onnx",
    tokenizer: Path | None = None,
    answers: Path | None = None,
    image_size: int | None = None,
    revision: str | None = None,
) -> None:
    """Export a model in parts, for any batch and text length: image tower, text tower and fusion encoder.

    The parts are run before they get their name: in ONNX Runtime and OpenVINO, whichever is installed.
    Prints the largest difference from the model by engine and part; if one is above 1e-4 (of
    the largest value, where that is above 1; onnx-int8: 0.2), nothing is written. The folder is a checkpoint as well.

    Example: bridgetower export MODEL my-export --format onnx

    Args:
        model: What to load.
        destination: New folder.
        form: onnx for engines onnxruntime and openvino; onnx-int8, with linear layers in int8, for onnxruntime.
        tokenizer: Folder or file with a tokenizer, for an official .ckpt.
        answers: JSON file with the list of answers, for an official .ckpt with a VQA head.
        image_size: Resize the position embeddings to this many pixels; an export takes pictures of one size.
        revision: Branch, tag or commit of a hub id.
    """
    from bridgetower.checkpoints import read_checkpoint
    from bridgetower.engines.folder import write_exported

    checkpoint = read_checkpoint(model, revision=revision, tokenizer=tokenizer, answers=answers)
    if image_size is not None:
        checkpoint = checkpoint.resized(image_size)
    differences = write_exported(checkpoint, destination, form, progress=sys.stderr.isatty())
    largest = max(value for parts in differences.values() for value in parts.values())
    emit(
        {
            "written": str(destination),
            "format": form,
            "largest_difference": largest,
            "largest_difference_by_part": differences,
        }
    )
