"""Random access to the rows of a Parquet file where it lies."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any


class ParquetRows:
    """The rows of a Parquet file, memory-mapped: each one is read when it is asked for, with its row group.

    `datasets` gives random access through a copy of the whole file in its own format. This needs none, but a file with
    small row groups, as `bridgetower.data.records.write_split` writes them: 1 MiB takes about as long to read as a
    tenth of decoding a photo.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.path = path
        self._file = pq.ParquetFile(path, memory_map=True)
        content = self._file.metadata
        self._ends = list(accumulate(content.row_group(group).num_rows for group in range(content.num_row_groups)))

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def __reduce__(self) -> tuple[type[ParquetRows], tuple[Path]]:
        return ParquetRows, (self.path,)  # worker processes map the file themselves

    def row(self, number: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """Returns a row, counted from 0: the named columns, or all of them.

        Raises:
            IndexError: There is no such row.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {self.path}; it has {len(self)}")
        group = bisect_right(self._ends, number)
        start = self._ends[group - 1] if group else 0
        table = self._file.read_row_group(group, columns=columns, use_threads=False)
        row: dict[str, Any] = table.slice(number - start, 1).to_pylist()[0]
        return row

    def column(self, name: str) -> list[Any]:
        """Returns one column of all rows."""
        values: list[Any] = self._file.read(columns=[name]).column(0).to_pylist()
        return values
