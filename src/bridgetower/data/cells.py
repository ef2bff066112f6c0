"""Rows of tables whose images stay where they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bridgetower.data.images import ImageRef, open_table
from bridgetower.data.sources import Cells, read_table

COLUMNAR = (".parquet", ".arrow")
"""Tables that are read by number, so that the images in them stay where they are."""


def rows_of(source: Path) -> Iterator[tuple[str, Cells]]:
    """Yields where each row of a table is, and its cells; images in it become `ImageRef`, without being read."""
    if source.suffix.lower() not in COLUMNAR:
        yield from read_table(source)
        return
    table = open_table(source)
    held = [field.name for field in table.schema if _holds_images(field.type)]
    others = [name for name in table.schema.names if name not in held]
    for number in range(len(table)):
        cells: Mapping[str, Any] = table.row(number, others) if others else {}
        yield f"row {number + 1}", {**cells, **{name: _held(source, name, number) for name in held}}


def _held(source: Path, column: str, row: int) -> ImageRef:
    name = f"{source.name}/{column} {row + 1}"
    return ImageRef(path=source, cell=(column, row), name=name, file_name=name, signature=name)


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        return any(kind.field(number).name == "bytes" for number in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
