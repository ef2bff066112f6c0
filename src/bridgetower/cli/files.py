"""Verbs that make files from files: convert and prepare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from bridgetower.cli.output import emit
from bridgetower.data.config import PairsConfig


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


def prepare(
    name: Positional[Literal["emoji", "flags", "pairs"]],
    source: Positional[Path | None] = None,
    *,
    out: Path,
    options: Annotated[PairsConfig, arg(name="")] = PairsConfig(),  # noqa: B008 - frozen
) -> None:
    """Make a data set: real emoji or flags from installed packages, or your own pictures with captions.

    Writes train, validation and test Parquet files and dataset.json, which says what was left out and why.

    Examples: bridgetower prepare emoji --out data/emoji
              bridgetower prepare pairs photos.csv --out data/photos

    Args:
        name: emoji and flags need `pip install 'bridgetower[demo]'`; pairs reads SOURCE.
        source: For pairs: CSV, TSV, JSON lines or Parquet with picture and caption columns, or a folder of pictures.
        out: Folder of the data set.
        options: For pairs; emoji and flags only take --seed.
    """
    from bridgetower.data.prepare import prepare as prepare_packaged
    from bridgetower.data.prepare import prepare_pairs

    progress = sys.stderr.isatty()
    if name == "pairs":
        if source is None:
            raise ValueError("prepare pairs needs a SOURCE: a CSV, TSV, JSON lines or Parquet file, or a folder")
        info = prepare_pairs(source, out, options, progress=progress)
    elif source is not None or options != PairsConfig(seed=options.seed):
        raise ValueError(f"prepare {name} takes no source and no option but --out and --seed")
    else:
        info = prepare_packaged(name, out, seed=options.seed, progress=progress)
    emit({"written": str(out), "splits": {split: part.images for split, part in info.splits.items()}})
