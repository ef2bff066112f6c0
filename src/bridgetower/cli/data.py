"""Prepare a data set: tables of images and examples, and dataset.json.

Also the command that inspects one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from bridgetower.cli.options import Json
from bridgetower.cli.output import emit, emit_following, emit_result, emit_rows, is_json
from bridgetower.cli.parsing import deferred
from bridgetower.data.sets.custom import CUSTOM_SETS, SOURCE_HELP, prepare_custom
from bridgetower.data.sets.datasets import DATASETS, prepare_arrow, prepare_set
from bridgetower.data.sets.datasets.spec import ArrowConfig
from bridgetower.data.sets.schema import Schema
from bridgetower.extras import load_object, require
from bridgetower.files import one_line, require_parent

Out = Annotated[Path, arg(help="Folder of the data set.")]
prepare = SubcommandApp()


def _add(name: str, doc: str, write: Callable[..., Any], source: Any, config: type[Any]) -> None:
    """Adds a command that writes one set, or several; its settings are options."""

    def run(*, source: Any, out: Out, options: Any, json: Json = False) -> None:
        require("train")
        written = write(source, out, options, progress=sys.stderr.isatty())
        for folder, info in written.items() if isinstance(written, dict) else [("", written)]:
            value = {
                "written": str(out / folder),
                "splits": info.counts(),
                "left_out": dict(info.left_out),
            }
            emit_result(value, json=json, following=("inspect", out / folder))

    if all(item.default is not MISSING for item in fields(config)):
        run.__kwdefaults__ = {"options": config(), "json": False}
    run.__annotations__ |= {"source": source, "options": Annotated[config, arg(name="")]}
    run.__doc__ = doc
    prepare.command(name=name)(deferred(run))


_ARROW = "\n".join(
    (
        "ViLT-style Arrow files, as the official code reads them: each set becomes a folder in --out.\n",
        "SOURCE holds files of some of these sets, .arrow each:",
        *(f"  {name}: {spec.arrow.layout}" for name, spec in DATASETS.items() if spec.arrow),
    )
)

_SOURCE = Annotated[Path, arg(help="Folder with the original files.")]

for _kind in CUSTOM_SETS.values():
    _custom_source = Positional[Annotated[str, arg(help=SOURCE_HELP)]]
    _add(
        _kind.name, _kind.summary, partial(prepare_custom, _kind.name), _custom_source, _kind.config
    )
for _spec in DATASETS.values():
    if _spec.fill:
        _add(_spec.name, _spec.help, partial(prepare_set, _spec.name), _SOURCE, _spec.config)
_add("arrow", _ARROW, prepare_arrow, _SOURCE, ArrowConfig)


def inspect(
    folder: Positional[Path],
    *,
    html: Path | None = None,
    num_samples: int = 8,
    seed: int = 0,
    check: bool = False,
    schema: str | None = None,
    json: Json = False,
) -> None:
    """Count the images and texts of a prepared data set, next to the published counts, and show samples.

    Prints a table on a terminal, else a line of JSON.

    Example: bridgetower inspect data/coco --html coco.html

    Args:
        folder: Folder of the data set.
        html: Page to write with samples of every split, images and texts, in one file.
        num_samples: Samples of each split.
        seed: Seed of the choice of samples.
        check: Read all images too and compare them with their checksums.
        schema: Custom schema that the rows have: FILE.py:NAME or module:NAME.
    """
    require("train")
    from bridgetower.data.sets.inspection import inspect as read_report
    from bridgetower.reports.samples import write_samples

    if html is not None:
        require_parent(html)
    progress = sys.stderr.isatty()
    own = None if schema is None else load_object("--schema", schema, Schema)
    info, splits = read_report(folder, schema=own, check=check, progress=progress)
    if html is not None:
        write_samples(folder, html, schema=own, num_samples=num_samples, seed=seed)
    if is_json(json):
        about = {name: getattr(info, name) for name in ("name", "kind", "split_rule", "protocol")}
        counts = {
            name: {**asdict(split), "published": split.published and split.published._asdict()}
            for name, split in splits.items()
        }
        page = None if html is None else str(html)
        emit({**about, "splits": counts, "left_out": dict(info.left_out), "html": page})
        return
    rows = []
    for name, split in splits.items():
        known = split.published
        pairs = ((split.images, known and known.images), (split.texts, known and known.texts))
        counted = [f"{count:,}" if of is None else f"{count:,} of {of:,}" for count, of in pairs]
        lengths = f"{split.words['median']}, {split.words['longest']}"
        rows.append((name, *counted, lengths, known.source if known else ""))
    titles = ("split", "images", "texts", "words: median, longest", "published by")
    emit_rows(f"{info.name} ({info.kind}): {info.split_rule}", titles, rows, texts=range(5))
    classes = {name: split.classes for name, split in splits.items() if split.classes}
    said = [
        f"{name}: {', '.join(f'{label} {count:,}' for label, count in own.items())}"
        for name, own in classes.items()
    ]
    for line in (
        info.protocol,
        *said,
        *(f"left out, {reason}: {count:,}" for reason, count in info.left_out.items()),
    ):
        if line:
            print(one_line(line))
    emit_following("train", "RECIPE", "--data.folders", folder, "--out", "runs/new")
