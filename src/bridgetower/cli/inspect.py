"""The verb that looks at a prepared data set."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from bridgetower.cli.output import emit
from bridgetower.extras import require
from bridgetower.files import one_line

if TYPE_CHECKING:
    from bridgetower.data.inspection import Report, SplitReport


def inspect(
    folder: Positional[Path],
    *,
    html: Path | None = None,
    num_samples: int = 8,
    seed: int = 0,
    check: bool = False,
    json: bool = False,
) -> None:
    """Count the images and texts of a prepared data set, beside the published counts, and show samples.

    Prints a table on a terminal, else a line of JSON.

    Example: bridgetower inspect data/coco --html coco.html

    Args:
        folder: Of the data set.
        html: Page to write with samples of every split, images and texts, in one file.
        num_samples: Of each split.
        seed: Of the choice of samples.
        check: Compare every file with its digest too; reads all images.
        json: Print JSON on a terminal too.
    """
    require("train")
    from bridgetower.data.inspection import inspect as read_report
    from bridgetower.data.inspection import write_samples

    progress = sys.stderr.isatty()
    report = read_report(folder, check=check, progress=progress)
    if html is not None:
        write_samples(folder, html, num_samples=num_samples, seed=seed)
    if json or not sys.stdout.isatty():
        emit(_as_json(report, html))
    else:
        _print_tables(report)


def _as_json(report: Report, html: Path | None) -> dict[str, Any]:
    info = report.info
    return {
        **{"name": info.name, "kind": info.kind, "split_rule": info.split_rule, "protocol": info.protocol},
        "splits": {name: _split_as_json(split) for name, split in report.splits.items()},
        "left_out": info.left_out_counts(),
        "html": None if html is None else str(html),
    }


def _split_as_json(split: SplitReport) -> dict[str, Any]:
    published = None if split.published is None else vars(split.published)
    counts = {"images": split.images, "texts": split.texts, "published": published}
    return {**counts, "bytes": split.size, "words": vars(split.words), "classes": dict(split.classes)}


def _print_tables(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    info, console = report.info, Console()

    def show(line: str) -> None:
        console.print(one_line(line), highlight=False, markup=False)

    show(f"{info.name} ({info.kind}): {info.split_rule}")
    if info.protocol:
        show(info.protocol)
    table = Table("split", "images", "texts", "words: median, longest", "published by")
    for name, split in report.splits.items():
        published = split.published
        images, texts = (None, None) if published is None else (published.images, published.texts)
        counts = _of(split.images, images), _of(split.texts, texts)
        source = "" if published is None else published.source
        table.add_row(name, *counts, f"{split.words.median}, {split.words.longest}", source)
    console.print(table)
    for name, split in report.splits.items():
        if split.classes:
            classes = ", ".join(f"{label} {count:,}" for label, count in split.classes.items())
            show(f"{name}: {classes}")
    for reason, count in info.left_out_counts().items():
        show(f"left out, {reason}: {count:,}")


def _of(count: int, published: int | None) -> str:
    return f"{count:,}" if published is None else f"{count:,} of {published:,}"
