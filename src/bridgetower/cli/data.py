"""Prepare a data set: tables of images and examples, and dataset.json.

Also the command that inspects one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from bridgetower.cli.options import Json
from bridgetower.cli.output import emit, emit_next_command, emit_result, emit_rows, is_json
from bridgetower.cli.parsing import deferred
from bridgetower.data.sets.custom import CUSTOM_SETS, SOURCE_HELP, prepare_custom
from bridgetower.data.sets.datasets import DATASETS, prepare_arrow, prepare_set
from bridgetower.data.sets.datasets.spec import ArrowConfig
from bridgetower.data.sets.schema import Schema
from bridgetower.extras import load_object, require
from bridgetower.files import one_line, require_parent

if TYPE_CHECKING:
    from bridgetower.data.sets.inspection import SplitReport

Out = Annotated[Path, arg(help="Folder of the data set.")]
prepare_command = SubcommandApp()


def _add(name: str, doc: str, write: Callable[..., Any], source: Any, config: type[Any]) -> None:
    """Adds the command of one kind of set, with its settings as options."""

    def run(*, source: Any, out: Out, options: Any, json: Json = False) -> None:
        require("train")
        written = write(source, out, options, progress=sys.stderr.isatty())
        for folder, info in written.items() if isinstance(written, dict) else [("", written)]:
            result = {
                "written": str(out / folder),
                "splits": info.counts(),
                "left_out": dict(info.left_out),
            }
            emit_result(result, json=json, next_command=("inspect", out / folder))

    if all(item.default is not MISSING for item in fields(config)):
        run.__kwdefaults__ = {"options": config(), "json": False}
    run.__annotations__ |= {"source": source, "options": Annotated[config, arg(name="")]}
    run.__doc__ = doc
    prepare_command.command(name=name)(deferred(run))


_LAYOUTS = "\n".join(
    f"  {name}: {spec.arrow.layout}" for name, spec in DATASETS.items() if spec.arrow
)
_ARROW = f"""ViLT-style Arrow files, as the official code reads them: each set becomes a folder in --out.

SOURCE holds files of some of these sets, .arrow each:
{_LAYOUTS}"""

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


def inspect_command(
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
    from bridgetower.data.sets.inspection import inspect_set
    from bridgetower.reports.samples import write_samples

    if html is not None:
        require_parent(html)
    progress = sys.stderr.isatty()
    custom_schema = None if schema is None else load_object("--schema", schema, Schema)
    info, splits = inspect_set(folder, schema=custom_schema, check=check, progress=progress)
    if html is not None:
        write_samples(folder, html, schema=custom_schema, num_samples=num_samples, seed=seed)
    if is_json(json):
        result: dict[str, Any] = {}
        for name in ("name", "kind", "split_rule", "protocol"):
            result[name] = getattr(info, name)
        result["splits"] = {
            name: {**asdict(split), "published": split.published and split.published._asdict()}
            for name, split in splits.items()
        }
        result["left_out"] = dict(info.left_out)
        result["html"] = None if html is None else str(html)
        emit(result)
        return

    # A table of the splits, lines on classes and on what is left out.
    rows = [_split_row(name, split) for name, split in splits.items()]
    titles = ("split", "images", "texts", "words: median, longest", "published by")
    emit_rows(f"{info.name} ({info.kind}): {info.split_rule}", titles, rows, texts=range(5))
    if info.protocol:
        print(one_line(info.protocol))
    for name, split in splits.items():
        if split.classes:
            counts = ", ".join(f"{label} {count:,}" for label, count in split.classes.items())
            print(one_line(f"{name}: {counts}"))
    for reason, count in info.left_out.items():
        print(one_line(f"left out, {reason}: {count:,}"))
    emit_next_command("train", "RECIPE", "--data.folders", folder, "--out", "runs/new")


def _split_row(name: str, split: SplitReport) -> tuple[str, ...]:
    """Returns the row of a split, with published counts where they are known."""
    published = split.published
    images = _count(split.images, published and published.images)
    texts = _count(split.texts, published and published.texts)
    lengths = f"{split.words['median']}, {split.words['longest']}"
    return name, images, texts, lengths, published.source if published else ""


def _count(count: int, published: int | None) -> str:
    return f"{count:,}" if published is None else f"{count:,} of {published:,}"
