"""Prepare a data set: tables of images and examples, and dataset.json.

Also the command that inspects one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import partial
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from bridgetower.cli.output import emit, emit_following, emit_result, is_json
from bridgetower.cli.parsing import deferred
from bridgetower.data.datasets import DATASETS, prepare_arrow, prepare_set
from bridgetower.data.datasets.arrow import ArrowConfig
from bridgetower.data.own import OWN_SETS, SOURCE_HELP, prepare_own
from bridgetower.data.schema import Schema
from bridgetower.extras import load_object, require
from bridgetower.files import one_line, require_parent

if TYPE_CHECKING:
    from bridgetower.data.inspection import SplitReport
    from bridgetower.data.prepared_set import DatasetInfo


SOURCE = {"source": Annotated[Path, arg(help="Folder with the original files.")]}
Out = Annotated[Path, arg(help="Folder of the data set.")]
Json = Annotated[bool, arg(help="Print JSON on a terminal too.")]
prepare = SubcommandApp()


def _add(name: str, doc: str, function: Callable[..., Any], sources: Mapping[str, Any], config: type[Any]) -> None:
    """Adds a command that writes one set, or several; the types of its sources and settings give its options."""

    def run(*, out: Path, options: Any, json: bool, **paths: Path) -> None:
        require("train")
        written = function(*paths.values(), out, options, progress=sys.stderr.isatty())
        for folder, info in written.items() if isinstance(written, dict) else [("", written)]:
            splits = {split: part.images for split, part in info.splits.items()}
            value = {"written": str(out / folder), "splits": splits, "left_out": dict(info.left_out)}
            emit_result(value, json=json, following=("inspect", out / folder))

    default = Parameter.empty if any(item.default is MISSING for item in fields(config)) else config()
    types = {**sources, "out": Out, "options": Annotated[config, arg(name="")], "json": Json}
    defaults = dict.fromkeys(types, Parameter.empty) | {"options": default, "json": False}
    run.__signature__ = Signature(  # type: ignore[attr-defined]
        [Parameter(key, Parameter.KEYWORD_ONLY, annotation=kind, default=defaults[key]) for key, kind in types.items()]
    )
    run.__annotations__, run.__doc__ = types, doc
    prepare.command(name=name)(deferred(run))


_ARROW = "\n".join(
    (
        "ViLT-style Arrow files, as the official code reads them: each set becomes a folder in --out.\n",
        "SOURCE holds files of some of these sets, .arrow each:",
        *(f"  {name}: {spec.arrow.layout}" for name, spec in DATASETS.items() if spec.arrow),
    )
)

for _kind in OWN_SETS.values():
    _source = {"source": Positional[Annotated[str, arg(help=SOURCE_HELP)]]}
    _add(_kind.name, _kind.summary, partial(prepare_own, _kind.name), _source, _kind.config)
for _spec in DATASETS.values():
    if _spec.fill:
        _add(_spec.name, _spec.help, partial(prepare_set, _spec.name), SOURCE, _spec.config)
_add("arrow", _ARROW, prepare_arrow, SOURCE, ArrowConfig)


def inspect(
    folder: Positional[Path],
    *,
    html: Path | None = None,
    num_samples: int = 8,
    seed: int = 0,
    check: bool = False,
    schema: str | None = None,
    json: bool = False,
) -> None:
    """Count the images and texts of a prepared data set, next to the published counts, and show samples.

    Prints a table on a terminal, else a line of JSON.

    Example: bridgetower inspect data/coco --html coco.html

    Args:
        folder: Of the data set.
        html: Page to write with samples of every split, images and texts, in one file.
        num_samples: Of each split.
        seed: Of the choice of samples.
        check: Read all images too and compare them with their checksums.
        schema: Schema of your own that the rows have: FILE.py:NAME or module:NAME.
        json: Print JSON on a terminal too.
    """
    require("train")
    from bridgetower.data.inspection import inspect as read_report
    from bridgetower.data.inspection import write_samples

    if html is not None:
        require_parent(html)
    progress = sys.stderr.isatty()
    own = None if schema is None else load_object("--schema", schema, Schema)
    info, splits = read_report(folder, schema=own, check=check, progress=progress)
    if html is not None:
        write_samples(folder, html, schema=own, num_samples=num_samples, seed=seed)
    if is_json(json):
        emit(_as_json(info, splits, html))
    else:
        _print_tables(info, splits)
        emit_following("train", "RECIPE", "--data.folders", folder, "--out", "runs/new")


def _as_json(info: DatasetInfo, reports: Mapping[str, SplitReport], html: Path | None) -> dict[str, Any]:
    splits = {}
    for name, split in reports.items():
        published = None if split.published is None else split.published._asdict()
        counts = {"images": split.images, "texts": split.texts, "published": published}
        splits[name] = {**counts, "words": split.words, "classes": dict(split.classes)}
    return {
        **{"name": info.name, "kind": info.kind, "split_rule": info.split_rule, "protocol": info.protocol},
        "splits": splits,
        "left_out": dict(info.left_out),
        "html": None if html is None else str(html),
    }


def _print_tables(info: DatasetInfo, splits: Mapping[str, SplitReport]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()

    def show(line: str) -> None:
        console.print(one_line(line), highlight=False, markup=False)

    show(f"{info.name} ({info.kind}): {info.split_rule}")
    if info.protocol:
        show(info.protocol)
    table = Table("split", "images", "texts", "words: median, longest", "published by")
    for name, split in splits.items():
        published = split.published
        counts = [
            f"{count:,}" if of is None else f"{count:,} of {of:,}"
            for count, of in (
                (split.images, published and published.images),
                (split.texts, published and published.texts),
            )
        ]
        source = published.source if published else ""
        table.add_row(name, *counts, f"{split.words['median']}, {split.words['longest']}", source)
    console.print(table)
    for name, split in splits.items():
        if split.classes:
            classes = ", ".join(f"{label} {count:,}" for label, count in split.classes.items())
            show(f"{name}: {classes}")
    for reason, count in info.left_out.items():
        show(f"left out, {reason}: {count:,}")
