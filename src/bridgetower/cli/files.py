"""Verbs that make files from files: convert and prepare."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from bridgetower.cli.output import emit


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
