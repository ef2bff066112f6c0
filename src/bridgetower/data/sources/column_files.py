"""Parquet and Arrow files, read a few rows at a time, or a cell at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any

from bridgetower.data.sources.fetch import open_location

_LARGEST_GROUP = 2**31  # bytes of a row group of a Parquet file
_AT_ONCE = 16  # rows


class ColumnFile:
    """A Parquet or Arrow file; the group of rows that a cell was read of last is kept."""

    def __init__(self, location: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._kept: tuple[int, str, Any] = (-1, "", None)
        self._parquet: Any = None
        try:
            if location.partition("?")[0].lower().endswith(".parquet"):
                self._parquet = pq.ParquetFile(open_location(location), pre_buffer=False)
                groups = [
                    self._parquet.metadata.row_group(number)
                    for number in range(self._parquet.num_row_groups)
                ]
                if (
                    largest := max((group.total_byte_size for group in groups), default=0)
                ) > _LARGEST_GROUP:
                    raise ValueError(
                        f"{location} has a row group of {largest} bytes; "
                        f"write it with groups of at most {_LARGEST_GROUP}"
                    )
                self.schema, sizes = (
                    self._parquet.schema_arrow,
                    [group.num_rows for group in groups],
                )
            else:
                file = open_location(location)
                is_stream = file.read(6) != b"ARROW1"  # as `datasets` writes it
                file.close()
                source = open_location(location) if "://" in location else pa.memory_map(location)
                opened = (pa.ipc.open_stream if is_stream else pa.ipc.open_file)(source)
                batches = (
                    opened if is_stream else map(opened.get_batch, range(opened.num_record_batches))
                )
                self._batches = list(batches)
                for batch in self._batches:
                    batch.validate(full=True)
                self.schema, sizes = opened.schema, [batch.num_rows for batch in self._batches]
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and not str(error).startswith(
                "Invalid"
            ):  # as pyarrow raises it, too
                raise
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{location} is no Parquet or Arrow file ({reason}); copy it again"
            ) from error
        self._ends = [0, *accumulate(sizes)]

    def batches(self, columns: list[str] | None = None) -> Iterator[Any]:
        if self._parquet is not None:
            yield from self._parquet.iter_batches(_AT_ONCE, columns=columns)
        else:
            for batch in self._batches:
                chosen = batch if columns is None else batch.select(columns)
                yield from (
                    chosen.slice(start, _AT_ONCE) for start in range(0, batch.num_rows, _AT_ONCE)
                )

    def value(self, column: str, row: int) -> Any:
        number = bisect_right(self._ends, row) - 1
        if column not in self.schema.names or number == len(self._ends) - 1:
            raise ValueError(
                f"there is no row {row + 1} with a column {column}; make the index again"
            )
        if self._kept[:2] != (number, column):
            group = (
                self._batches[number]
                if self._parquet is None
                else self._parquet.read_row_group(number, [column])
            )
            self._kept = number, column, group[column]
        return self._kept[2][row - self._ends[number]].as_py()


@lru_cache(maxsize=4)
def open_columns(location: str, version: str) -> ColumnFile:
    return ColumnFile(location)


def cell_bytes(value: object) -> bytes | None:
    """Returns the image in a cell, plain or beside a path as `datasets` writes it; None if there is none."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return content if isinstance(content, bytes) else None
