"""Rows of tables whose images stay where they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bridgetower.data.images import ImageRef, Table, open_table
from bridgetower.data.sources import Cells, read_table

COLUMNAR = (".parquet", ".arrow")
"""Tables that are read by number, so that the images in them stay where they are."""


def rows_of(source: Path) -> tuple[Sequence[str], Iterator[tuple[str, Cells]]]:
    """Returns the columns of a table that hold images, and its rows: where each is, and its cells.

    Images become `ImageRef` without being read, those that are only a path that path, and missing ones None.
    """
    if source.suffix.lower() not in COLUMNAR:
        return (), read_table(source)
    table = open_table(source)
    images = [field.name for field in table.schema if _holds_images(field.type)]
    return images, _rows(source, table, images)


def _rows(source: Path, table: Table, images: Sequence[str]) -> Iterator[tuple[str, Cells]]:
    others = [name for name in table.schema.names if name not in images]
    filled = {name: table.filled(name) for name in images}
    for number in range(len(table)):
        cells: Mapping[str, Any] = table.row(number, others) if others else {}
        held = {name: _held(source, table, name, number, full=next(filled[name])) for name in images}
        yield f"row {number + 1}", {**cells, **held}


def _held(source: Path, table: Table, column: str, row: int, *, full: bool) -> ImageRef | str | None:
    if not full:
        value = table.row(row, [column])[column]
        return value.get("path") if isinstance(value, dict) else None
    name = f"{source.name}/{column} {row + 1}"
    return ImageRef(path=source, cell=(column, row), name=name, file_name=name, signature=name)


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if not pa.types.is_struct(kind):
        return _is_binary(kind)
    fields = {field.name: field.type for field in map(kind.field, range(kind.num_fields))}
    return "bytes" in fields and (pa.types.is_null(fields["bytes"]) or _is_binary(fields["bytes"]))


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
