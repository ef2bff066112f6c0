"""Rows and columns of Parquet files, memory-mapped."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, repeat
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar, overload

if TYPE_CHECKING:
    import pyarrow as pa
    from jaxtyping import Int
    from torch import Tensor

T = TypeVar("T")


def read_schema(path: Path) -> pa.Schema:
    """Reads the columns of a Parquet file and what its schema is marked with.

    Raises:
        ValueError: If it is none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file; run `bridgetower prepare` again") from error


class ParquetRows:
    """The rows of one or more Parquet files, memory-mapped: each is read on its own, with its row group.

    `datasets` gives random access through a copy of the whole file in its own format. This needs none, but files with
    small row groups, as `bridgetower.data.records.write_split` writes them: 1 MiB takes about as long to read as a
    tenth of decoding a photo. For small sets of small images that is much: `keep` keeps what was read.

    Attributes:
        paths: Of the files.
        file_ends: Number of rows up to the end of each file.
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
        self.file_ends = list(accumulate(content.num_rows for content in contents))

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

    def place(self, number: int) -> tuple[int, int]:
        """Returns the file of a row, and its number there."""
        file = bisect_right(self.file_ends, number)
        return file, number - (self.file_ends[file - 1] if file else 0)

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

    def stream(self, name: str) -> Iterator[Any]:
        """Yields one column of all rows, one row group in memory at a time."""
        for file, group in self._groups:
            yield from self._files[file].read_row_group(group, columns=[name]).column(0).to_pylist()

    def column(self, name: str) -> pa.ChunkedArray:
        """Returns one column of all rows."""
        import pyarrow as pa

        return pa.chunked_array(
            [chunk for file in self._files for chunk in file.read(columns=[name]).column(0).chunks],
            self._files[0].schema_arrow.field(name).type,
        )


def has_bytes(column: pa.ChunkedArray) -> list[bool]:
    """Returns whether each row of a column of images has bytes, plain or beside a path."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    filled: list[bool] = pc.is_valid(column).to_pylist()
    return filled


class Column(Sequence[T]):
    """A column of texts or of lists of texts in one Arrow array.

    Ten million captions as Python objects take gigabytes, and every worker process copies them: reading an object
    writes to the count of its references, and so to its page of memory. An array is only read.
    """

    def __init__(self, array: pa.Array) -> None:
        self._array = array

    @classmethod
    def read(cls, tables: Sequence[ParquetRows], name: str) -> Column[Any]:
        """Reads one column of texts, or of lists of texts, of several tables, one after the other."""
        import pyarrow as pa

        found = [table.column(name) for table in tables]
        is_list = pa.types.is_list(found[0].type)
        kind = pa.large_list(pa.large_string()) if is_list else pa.large_string()  # of any size altogether
        array = pa.chunked_array(
            [chunk.cast(kind) for column in found for chunk in column.chunks], kind
        ).combine_chunks()
        del found
        pa.default_memory_pool().release_unused()
        return cls(array)

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Column[T]: ...

    def __getitem__(self, index: int | slice) -> T | Column[T]:
        """Returns the value of a row, or the column of some rows without copying it."""
        if isinstance(index, slice):
            return Column(self._array[index])
        value: T = self._array[index].as_py()
        return value

    def without_repeats(self) -> Column[T]:
        """Returns the lists with each text once, where it comes first."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        texts, rows = self._array.flatten(), pc.list_parent_indices(self._array).to_numpy()
        numbers = texts.dictionary_encode().indices.to_numpy().astype(np.int64)  # equal for equal texts
        kept = np.sort(np.unique(rows * (len(texts) + 1) + numbers, return_index=True)[1])
        if len(kept) == len(texts):
            return self
        ends = np.bincount(rows[kept], minlength=len(self)).cumsum()
        return Column(pa.LargeListArray.from_arrays(np.concatenate([[0], ends]), texts.take(pa.array(kept))))

    def lengths(self) -> Int[Tensor, " n"]:
        """Returns the number of texts of each row of lists."""
        import pyarrow.compute as pc
        import torch

        return torch.from_numpy(pc.list_value_length(self._array).to_numpy(zero_copy_only=False).copy())
