"""Rows and columns of Parquet files, memory-mapped."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, repeat
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


class ParquetRows:
    """The rows of one or more Parquet files, memory-mapped: each is read on its own, with its row group.

    `datasets` gives random access through a copy of the whole file in its own format. This needs none, but files with
    small row groups; `keep` keeps the last that were read.

    Attributes:
        paths: Of the files.
    """

    def __init__(self, paths: Sequence[Path], *, keep: float = 0, coded: Sequence[str] = ()) -> None:
        """Opens the files.

        Args:
            paths: Of the files.
            keep: Row groups that stay in memory, the last ones read; infinity keeps all.
            coded: Columns that are read as places in a dictionary, so that a value of many rows is in memory once.
        """
        import pyarrow.parquet as pq

        self.paths, self._keep, self._coded, self._lock = tuple(paths), keep, coded, Lock()
        self._kept: OrderedDict[tuple[int, Sequence[str] | None], Any] = OrderedDict()
        self._files = [pq.ParquetFile(path, memory_map=True, read_dictionary=coded) for path in self.paths]
        contents = [file.metadata for file in self._files]
        self._groups = [
            (file, group) for file, content in enumerate(contents) for group in range(content.num_row_groups)
        ]
        self._ends = list(accumulate(contents[file].row_group(group).num_rows for file, group in self._groups))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __reduce__(self) -> tuple[partial[ParquetRows], tuple[Sequence[Path]]]:
        return partial(ParquetRows, keep=self._keep, coded=self._coded), (
            self.paths,
        )  # worker processes map the files themselves

    @property
    def schema(self) -> pa.Schema:
        """The columns of the first file."""
        return self._files[0].schema_arrow

    @property
    def largest_group(self) -> int:
        """Bytes of the largest row group."""
        sizes = (self._files[file].metadata.row_group(group).total_byte_size for file, group in self._groups)
        return max(sizes, default=0)

    def row(self, number: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """Returns a row, counted from 0 over all files: the named columns, or all of them.

        Raises:
            IndexError: There is no such row.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {', '.join(map(str, self.paths))}; there are {len(self)}")
        place = bisect_right(self._ends, number)
        start = self._ends[place - 1] if place else 0
        row: dict[str, Any] = self._group(place, columns).slice(number - start, 1).to_pylist()[0]
        return row

    def _group(self, place: int, columns: Sequence[str] | None) -> Any:
        key = place, None if columns is None else tuple(columns)
        with self._lock:
            table = self._kept.get(key)
            if table is None:
                file, group = self._groups[place]
                table = self._files[file].read_row_group(group, columns=columns, use_threads=False)
                self._kept[key] = table
                if len(self._kept) > self._keep:
                    self._kept.popitem(last=False)
            return table

    def filled(self, name: str) -> Iterator[bool]:
        """Yields whether each row has bytes in a column of images.

        Images are read only of a row group that has them in some rows and not in others, or does not say so.
        """
        for file, group in self._groups:
            content = self._files[file].metadata.row_group(group)
            columns = map(content.column, range(content.num_columns))
            column = next(one for one in columns if one.path_in_schema in (name, f"{name}.bytes"))
            nulls = column.statistics.null_count if column.statistics and column.statistics.has_null_count else None
            if nulls in (0, content.num_rows):
                yield from repeat(nulls == 0, content.num_rows)
            else:
                yield from has_bytes(self._files[file].read_row_group(group, columns=[column.path_in_schema]).column(0))


def has_bytes(column: pa.ChunkedArray) -> list[bool]:
    """Returns whether each row of a column of images has bytes, plain or beside a path."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    filled: list[bool] = pc.is_valid(column).to_pylist()
    return filled
