"""Verbs of search: index."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from bridgetower.cli.options import AS_USUAL, Loading, Model
from bridgetower.cli.output import emit
from bridgetower.search.config import IndexConfig


def index(
    source: Positional[Path],
    *,
    out: str,
    model: Model,
    options: Annotated[IndexConfig, arg(name="")] = IndexConfig(),  # noqa: B008 - frozen
    loading: Loading = AS_USUAL,
) -> None:
    """Make pictures findable by text: their vectors in an index, which `bridgetower search` looks through.

    Takes a folder of JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF files with all folders in it, or a table of paths and
    captions. Captions get vectors of their own and together with their picture. Run again, it embeds what is new or has
    changed and takes out what is gone; killed, it is completed by running it again.

    Examples: bridgetower index photos --out photos.lance --model MODEL
              bridgetower index photos/captions.csv --out photos.lance --model MODEL

    Args:
        source: Folder, perhaps with a NAME.txt of captions beside NAME.jpg, or CSV, TSV or JSON lines.
        out: Folder of the index, its name ending in .lance; or the URI of one in an object store, such as
            s3://bucket/photos.lance.
        model: What to load.
        options: How.
        loading: How the model is loaded.
    """
    from bridgetower.search.build import build_index

    report = build_index(source, out, loading.load(model), options, progress=sys.stderr.isatty())
    emit({"index": out, **asdict(report)})
