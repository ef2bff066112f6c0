"""Where the images of a source are: in files, tar archives, tables or videos; and how their bytes are read."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from bridgetower.data.parquet import ParquetRows, has_bytes
from bridgetower.data.remote import file_name, read_url
from bridgetower.files import unfit_name

IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
MAX_TEXT = 2**20
"""Bytes of a file of captions of one image, and characters of a line of any table."""

MAX_GROUP_BYTES = 2**26
"""Largest row group that is read to get one of its images."""

_UNPACKED, _UNPACKED_AT_LEAST = 64, 2**28  # times the size of a Parquet file, and bytes
_VALUE = 8  # bytes that a value takes at least
_GROUPS = 4  # row groups that are kept, as rows are read in order
_COPIED = 100  # rows of a Parquet file that are copied at once
_DIGEST_LETTERS = 32
_ARROW_FILE = b"ARROW1"  # begins a file that is no stream, as `datasets` writes it

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImageRef:
    """Where an image's bytes are: in a file of its own, an archive, a cell of a table, or a frame of a video.

    Attributes:
        path: The file; of one at a URL its name.
        name: Identifies the image; rows with the same name are about the same image.
        file_name: Name to store it under.
        piece: Where in an archive its content starts, and its length, in bytes.
        cell: Its column and row in a Parquet or Arrow file.
        signature: Size in bytes, or a digest of the content; None to look at the file.
        url: Where the file is, if it is not on this machine.
        moment: Start and end in seconds of the part of a video whose middle frame it is.
    """

    path: Path
    name: str
    file_name: str
    piece: tuple[int, int] | None = None
    cell: tuple[str, int] | None = None
    signature: str | None = None
    url: str | None = None
    moment: tuple[float, float] | None = None

    @classmethod
    def of_url(cls, url: str) -> ImageRef:
        """An image in a file of its own at a URL, which is its name and its signature."""
        name = file_name(url)
        return cls(path=Path(name), name=url, file_name=name, signature=url, url=url)

    @classmethod
    def of_file(cls, root: Path, name: str) -> ImageRef:
        """An image in a file of its own, named from a folder on."""
        return cls(path=root / name, name=name, file_name=Path(name).name)

    @property
    def is_file(self) -> bool:
        """Whether the image is a file of its own on this machine."""
        return self.piece is None and self.cell is None and self.url is None and self.moment is None

    @property
    def file_signature(self) -> str | None:
        """What changes when the image does; None if it is missing, or cannot be as its name is too long.

        The time of writing does not count: the same content unpacked again has the same signature.
        """
        if self.signature is not None:
            return self.signature
        try:
            return str(self.path.stat().st_size) if self.path.is_file() else None
        except OSError:
            return None

    def read(self) -> bytes:
        """Returns the content of the image file.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it is empty or longer than an image, an archive ends before, or a cell has no image.
        """
        from bridgetower.processor import check_length  # which needs torch; the help of commands does not

        if self.moment:
            from bridgetower.data.frames import frame_of
            from bridgetower.data.remote_videos import copy_of

            path = copy_of(self.url) if self.url else self.path
            return frame_of(path, sum(self.moment) / 2, self.name)
        if self.url:
            return read_url(self.url, self.piece)
        if self.cell:
            column, row = self.cell
            content = _cell_bytes(open_table(self.path).row(row, [column])[column])
            if content is None:
                raise ValueError(f"{self.path}, row {row + 1} has no bytes in column {column}")
            return content
        start, size = self.piece or (0, self.path.stat().st_size)
        check_length(self.file_name, size)
        with self.path.open("rb") as file:
            file.seek(start)
            content = file.read(size)
        if len(content) < size:
            raise ValueError(f"{self.path} ends in the middle of {self.file_name}; copy it again")
        return content

    def packed(self) -> str:
        """Returns all that `unpacked` needs."""
        return json.dumps(vars(self), default=str)

    @classmethod
    def unpacked(cls, content: str) -> ImageRef:
        """Returns the image of which `content` is the packed form."""
        values = json.loads(content)
        places = {name: tuple(values[name]) if values[name] else None for name in ("piece", "cell", "moment")}
        return cls(**{**values, **places, "path": Path(values["path"])})


def check_text(name: str, length: int) -> None:
    """Checks a length before a text takes memory.

    Raises:
        ValueError: It is longer than `MAX_TEXT`.
    """
    if length > MAX_TEXT:
        raise ValueError(f"{name} has more than {MAX_TEXT} bytes or characters; expected captions of one image")


class Table(Protocol):
    """Rows by number."""

    @property
    def schema(self) -> Any:
        """The names and Arrow types of the columns."""
        ...

    def __len__(self) -> int: ...

    def row(self, number: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """Returns the named columns of a row, or all of them."""
        ...

    def filled(self, name: str) -> Iterator[bool]:
        """Yields whether each row has bytes in a column of images."""
        ...


class _Copy:
    """The rows of a Parquet file with large row groups, in a copy that `datasets` makes and keeps in its cache."""

    def __init__(self, path: Path) -> None:
        import datasets

        cache = datasets.config.HF_DATASETS_CACHE
        logger.info("%s is copied to %s unless it already was; HF_DATASETS_CACHE names another place", path, cache)
        self._table = datasets.Dataset.from_parquet(str(path), batch_size=_COPIED).with_format("arrow")

    @property
    def schema(self) -> Any:
        return self._table.features.arrow_schema

    def __len__(self) -> int:
        return len(self._table)

    def row(self, number: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        chosen = self._table if columns is None else self._table.select_columns(list(columns))
        row: dict[str, Any] = chosen[number].to_pylist()[0]
        return row

    def filled(self, name: str) -> Iterator[bool]:
        return iter(has_bytes(self._table.data.column(name)))


class ArrowRows:
    """The rows of an uncompressed file in Arrow's IPC file or stream format, memory-mapped."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._file = pa.memory_map(str(path))
        self.content = self._file.read_buffer()
        is_file = self.content[: len(_ARROW_FILE)].to_pybytes() == _ARROW_FILE
        self.table = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(self.content).read_all()
        self.table.validate(full=True)  # else cells end anywhere in the memory; images are not read
        self.schema = self.table.schema

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def row(self, number: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """Returns the named columns of a row, or all of them."""
        chosen = self.table if columns is None else self.table.select(list(columns))
        row: dict[str, Any] = chosen.slice(number, 1).to_pylist()[0]
        return row

    def filled(self, name: str) -> Iterator[bool]:
        """Yields whether each row has bytes in a column of images."""
        return iter(has_bytes(self.table[name]))


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

    is_arrow = path.suffix.lower() == ".arrow"
    try:
        if is_arrow:
            return ArrowRows(path)
        rows = ParquetRows([path], keep=_GROUPS, coded=_checked_columns(path, size))
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        what = "Arrow IPC file" if is_arrow else "Parquet file"
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is no {what} ({reason}); copy it again, or write it in that format") from error
    return _Copy(path) if rows.largest_group > MAX_GROUP_BYTES else rows


def _checked_columns(path: Path, size: int) -> list[str]:
    """Returns the columns of a Parquet file that are stored as places in a dictionary.

    Raises:
        ValueError: The file claims to take much more memory than tables shrink by.
    """
    import pyarrow.parquet as pq

    content = pq.read_metadata(path)
    widths = [max(_VALUE, content.schema.column(number).length) for number in range(content.num_columns)]
    coded: set[str] = set()
    unpacked = 0
    for group in map(content.row_group, range(content.num_row_groups)):
        for column, width in zip(map(group.column, range(group.num_columns)), widths, strict=True):
            unpacked += max(column.total_uncompressed_size, column.num_values * width)
            if column.physical_type == "BYTE_ARRAY" and any("DICTIONARY" in name for name in column.encodings):
                coded.add(column.path_in_schema)
    if unpacked > max(_UNPACKED * size, _UNPACKED_AT_LEAST):
        raise ValueError(
            f"{path} would be {unpacked} bytes unpacked, more than {_UNPACKED} times its {size}; expected a table that "
            "was not made to fill the memory"
        )
    return sorted(coded)


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
    content = _cell_bytes(value)
    given = value.get("path") if isinstance(value, dict) else None
    file = given if isinstance(given, str) else None
    if content is None:
        return file if file is not None or (isinstance(value, dict) and "bytes" in value) else value
    digest = hashlib.sha256(content).hexdigest()[:_DIGEST_LETTERS]
    name = Path(file).name if file else digest
    return ImageRef(path=path, cell=(column, row), name=digest, file_name=name, signature=digest)


def _cell_bytes(value: object) -> bytes | None:
    """The bytes in a cell, if there are any: plain, or beside a path."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return content if isinstance(content, bytes) else None
