"""Rows and columns of Parquet and Arrow files; images of other people's files are left where they are."""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

from bridgetower.data.images import ImageRef
from bridgetower.files import unfit_name

if TYPE_CHECKING:
    import pyarrow as pa
    from jaxtyping import Int
    from torch import Tensor

T = TypeVar("T")

MAX_GROUP_BYTES = 2**26
"""Largest row group that is read to get one of its images."""

_GROUPS = 4  # row groups that are kept, as rows are asked for in order
_ROWS = 1000  # of an Arrow file that are read at once, without their images
_DIGEST_LETTERS = 32

logger = logging.getLogger(__name__)


class Table(Protocol):
    """Rows by number."""

    def __len__(self) -> int: ...

    def row(self, number: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """Returns the named columns of a row, or all of them."""
        ...


class ParquetRows:
    """The rows of one or more Parquet files, memory-mapped: each is read when it is asked for, with its row group.

    `datasets` gives random access through a copy of the whole file in its own format. This needs none, but files with
    small row groups, as `bridgetower.data.writer.write_split` writes them: 1 MiB takes about as long to read as a
    tenth of decoding a photo. For small sets of small images that is much: `keep` keeps what was read.
    """

    def __init__(self, paths: Sequence[Path], *, keep: float = 0) -> None:
        """Opens the files.

        Args:
            paths: Of the files.
            keep: Row groups that stay in memory, the last ones read; infinity keeps all.
        """
        import pyarrow.parquet as pq

        self.paths, self._keep, self._lock = tuple(paths), keep, Lock()
        self._kept: OrderedDict[tuple[int, Sequence[str] | None], Any] = OrderedDict()
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

    def lengths(self) -> Int[Tensor, " n"]:
        """Returns the number of texts of each row of lists."""
        import pyarrow.compute as pc
        import torch

        return torch.from_numpy(pc.list_value_length(self._array).to_numpy(zero_copy_only=False).copy())


class _Copy:
    """The rows of a Parquet file with large row groups, in a copy that `datasets` makes and keeps in its cache."""

    def __init__(self, path: Path) -> None:
        import datasets

        cache = datasets.config.HF_DATASETS_CACHE
        logger.info("%s is copied to %s unless it already was; HF_DATASETS_CACHE names another place", path, cache)
        self._table = datasets.Dataset.from_parquet(str(path)).with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def row(self, number: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        chosen = self._table if columns is None else self._table.select_columns(list(columns))
        row: dict[str, Any] = chosen[number].to_pylist()[0]
        return row


class ArrowRows:
    """The rows of an uncompressed file in Arrow's IPC file format, memory-mapped."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._file = pa.memory_map(str(path))
        self.content = self._file.read_buffer()
        self.table = pa.ipc.open_file(self.content).read_all()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def row(self, number: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """Returns the named columns of a row, or all of them."""
        chosen = self.table if columns is None else self.table.select(list(columns))
        row: dict[str, Any] = chosen.slice(number, 1).to_pylist()[0]
        return row


def open_table(path: Path) -> Table:
    """Opens a Parquet or Arrow file, once as long as it is not written again.

    Raises:
        ValueError: If it is none, or cannot be named.
    """
    if problem := unfit_name(str(path)):
        raise ValueError(problem)
    status = path.stat()
    return _opened(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _opened(path: Path, size: int, written: int) -> Table:
    import pyarrow as pa

    is_arrow = path.suffix == ".arrow"
    try:
        if is_arrow:
            return ArrowRows(path)
        rows = ParquetRows([path], keep=_GROUPS)
    except pa.ArrowInvalid as error:
        what = "Arrow IPC file" if is_arrow else "Parquet file"
        raise ValueError(f"{path} is no {what} ({error}); copy it again, or write it in that format") from error
    return _Copy(path) if rows.largest_group > MAX_GROUP_BYTES else rows


def parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Reads the rows of a Parquet file; images become `ImageRef`, images that are only a path that path.

    A file whose row groups are large is copied to the cache of `datasets` first, and the copy stays there: no single
    image of it could be read without the memory for a group.

    Raises:
        ValueError: If it is no Parquet file.
    """
    table = open_table(path)
    for number in range(len(table)):
        yield {name: _cell(path, name, number, value) for name, value in table.row(number).items()}


def _cell(path: Path, column: str, row: int, value: object) -> object:
    """Replaces image bytes by where they are, and an image that is only a path by the path."""
    content = cell_bytes(value)
    given = value.get("path") if isinstance(value, dict) else None
    file = given if isinstance(given, str) else None
    if content is None:
        return value if file is None else file
    digest = hashlib.sha256(content).hexdigest()[:_DIGEST_LETTERS]
    name = Path(file).name if file else digest
    return ImageRef(path=path, cell=(column, row), name=digest, file_name=name, signature=digest)


def cell_bytes(value: object) -> bytes | None:
    """The bytes in a cell, if there are any: plain, or beside a path."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return content if isinstance(content, bytes) else None


def arrow_rows(
    path: Path, images: Sequence[str], columns: Sequence[str], lists: Sequence[str] = ()
) -> Iterator[Mapping[str, Any]]:
    """Reads the rows of an Arrow file; images become `ImageRef`, or None where there is none.

    Args:
        path: An uncompressed file in Arrow's IPC file format.
        images: Columns of image bytes.
        columns: Other columns to read.
        lists: Those of them that hold a list in each row.

    Raises:
        ValueError: If it is no such file, a column is missing, or one holds something else.
    """
    import pyarrow.compute as pc

    rows = open_table(path)
    assert isinstance(rows, ArrowRows)
    _check_columns(path, rows, images, columns, lists)
    sizes = {name: pc.binary_length(rows.table[name]) for name in images}
    for start in range(0, len(rows), _ROWS):
        lengths = {name: sizes[name].slice(start, _ROWS).to_pylist() for name in images}
        for place, row in enumerate(rows.table.select(list(columns)).slice(start, _ROWS).to_pylist()):
            refs = {name: _arrow_image(path, name, start + place, lengths[name][place]) for name in images}
            yield {**row, **refs}


def _arrow_image(path: Path, column: str, row: int, size: int | None) -> ImageRef | None:
    if size is None:
        return None
    name = f"{path.name}/row {row}"
    return ImageRef(path=path, cell=(column, row), name=name, file_name=name, signature=str(size))


def _check_columns(
    path: Path, rows: ArrowRows, images: Sequence[str], columns: Sequence[str], lists: Sequence[str]
) -> None:
    import pyarrow as pa

    schema = rows.table.schema
    missing = [name for name in (*images, *columns) if name not in schema.names]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(schema.names)}")
    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    flat = [name for name in lists if not any(check(schema.field(name).type) for check in is_list)]
    if flat:
        types = ", ".join(str(schema.field(name).type) for name in flat)
        raise ValueError(f"{path} has {types} in column {', '.join(flat)}; expected a list in each row")
    for name in images:
        kind = schema.field(name).type
        if not pa.types.is_binary(kind) and not pa.types.is_large_binary(kind):
            raise ValueError(f"{path} has images of type {kind}; expected bytes")
        values = [chunk.buffers()[2] for chunk in rows.table[name].chunks if chunk.buffers()[2]]
        start, end = rows.content.address, rows.content.address + rows.content.size
        if not all(start <= each.address < end for each in values):
            raise ValueError(f"{path} is compressed; write it again without compression")
