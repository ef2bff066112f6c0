"""Parquet and Arrow files, read a few rows at a time, or one cell at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any

from bridgetower.data.sources.fetch import open_location

_LARGEST_GROUP = 2**31  # bytes of a row group of a Parquet file
_BATCH_SIZE = 16  # rows


class ColumnFile:
    """A Parquet or Arrow file, which keeps the group of rows that a cell was read from last."""

    def __init__(self, location: str) -> None:
        import pyarrow as pa

        self._parquet: Any = None
        self._batches: list[Any] = []
        self._last_key = (-1, "")  # group and column of the last cell
        self._last_cells: Any = None
        try:
            if location.partition("?")[0].lower().endswith(".parquet"):
                sizes = self._open_parquet(location)
            else:
                sizes = self._open_arrow(location)
        except (pa.ArrowException, OSError) as error:
            # Of damaged content, pyarrow raises an OSError too.
            if isinstance(error, OSError) and not str(error).startswith("Invalid"):
                raise
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{location} is no Parquet or Arrow file ({reason}); copy it again"
            ) from error
        self._group_ends = [0, *accumulate(sizes)]

    def _open_parquet(self, location: str) -> list[int]:
        import pyarrow.parquet as pq

        self._parquet = pq.ParquetFile(open_location(location), pre_buffer=False)
        self.schema = self._parquet.schema_arrow
        metadata = self._parquet.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > _LARGEST_GROUP:
            raise ValueError(
                f"{location} has a row group of {largest} bytes; "
                f"write it with groups of at most {_LARGEST_GROUP}"
            )
        return [group.num_rows for group in groups]

    def _open_arrow(self, location: str) -> list[int]:
        import pyarrow as pa

        with open_location(location) as file:
            is_stream = file.read(6) != b"ARROW1"  # as `datasets` writes it
        source = open_location(location) if "://" in location else pa.memory_map(location)
        if is_stream:
            reader = pa.ipc.open_stream(source)
            self._batches = list(reader)
        else:
            reader = pa.ipc.open_file(source)
            self._batches = [reader.get_batch(n) for n in range(reader.num_record_batches)]
        self.schema = reader.schema
        for batch in self._batches:
            batch.validate(full=True)
        return [batch.num_rows for batch in self._batches]

    def batches(self, columns: list[str] | None = None) -> Iterator[Any]:
        """Yields a few rows at a time, of all columns or of some."""
        if self._parquet is not None:
            yield from self._parquet.iter_batches(_BATCH_SIZE, columns=columns)
        for batch in self._batches:
            selected = batch if columns is None else batch.select(columns)
            for start in range(0, batch.num_rows, _BATCH_SIZE):
                yield selected.slice(start, _BATCH_SIZE)

    def value(self, column: str, row: int) -> Any:
        """Returns the cell of a column in a row, counted from 0."""
        group = bisect_right(self._group_ends, row) - 1
        if column not in self.schema.names or group == len(self._group_ends) - 1:
            raise ValueError(
                f"there is no row {row + 1} with a column {column}; make the index again"
            )
        if self._last_key != (group, column):
            if self._parquet is None:
                rows = self._batches[group]
            else:
                rows = self._parquet.read_row_group(group, [column])
            self._last_cells = rows[column]
            self._last_key = (group, column)
        cell = self._last_cells[row - self._group_ends[group]]
        return cell.as_py()


@lru_cache(maxsize=4)
def open_columns(location: str, version: str) -> ColumnFile:
    return ColumnFile(location)


def cell_bytes(value: object) -> bytes | None:
    """Returns the image in a cell, plain or beside a path as `datasets` writes it, or None."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return content if isinstance(content, bytes) else None
