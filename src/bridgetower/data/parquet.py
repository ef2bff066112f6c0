"""Random access to the rows of Parquet files where they lie."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any


class ParquetRows:
    """The rows of one or more Parquet files, memory-mapped: each is read when it is asked for, with its row group.

    `datasets` gives random access through a copy of the whole file in its own format. This needs none, but files with
    small row groups, as `bridgetower.data.records.write_split` writes them: 1 MiB takes about as long to read as a
    tenth of decoding a photo. For small sets of small pictures that is much: `keep` keeps what was read.
    """

    def __init__(self, paths: Sequence[Path], *, keep: bool = False) -> None:
        """Opens the files.

        Args:
            paths: Of the files.
            keep: Keep every row group that was read in memory.
        """
        import pyarrow.parquet as pq

        self.paths, self._keep = tuple(paths), keep
        self._kept: dict[tuple[int, Sequence[str] | None], Any] = {}
        self._files = [pq.ParquetFile(path, memory_map=True) for path in self.paths]
        contents = [file.metadata for file in self._files]
        self._groups = [
            (file, group) for file, content in enumerate(contents) for group in range(content.num_row_groups)
        ]
        self._ends = list(accumulate(contents[file].row_group(group).num_rows for file, group in self._groups))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __reduce__(self) -> tuple[partial[ParquetRows], tuple[Sequence[Path]]]:
        return partial(ParquetRows, keep=self._keep), (self.paths,)  # worker processes map the files themselves

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
        if key in self._kept:
            return self._kept[key]
        file, group = self._groups[place]
        table = self._files[file].read_row_group(group, columns=columns, use_threads=False)
        if self._keep:
            self._kept[key] = table
        return table

    def stream(self, name: str) -> Iterator[Any]:
        """Yields one column of all rows, one row group in memory at a time."""
        for file, group in self._groups:
            yield from self._files[file].read_row_group(group, columns=[name]).column(0).to_pylist()

    def column(self, name: str) -> list[Any]:
        """Returns one column of all rows."""
        return [value for file in self._files for value in file.read(columns=[name]).column(0).to_pylist()]
