"""Where a picture's bytes are: in a file of its own, in a piece of a larger one, or in a cell of a Parquet file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


class Picture(Protocol):
    """Where a picture's bytes are."""

    @property
    def name(self) -> str:
        """Identifies the picture; rows with the same name are about the same picture."""
        ...

    @property
    def file_name(self) -> str:
        """Name to store it under."""
        ...

    @property
    def stamp(self) -> str | None:
        """Size in bytes, or a digest of the content; None if the picture is missing.

        It does not tell when the file was written: the same content unpacked again has the same stamp.
        """
        ...

    def read(self) -> bytes:
        """The picture file's content."""
        ...

    def packed(self) -> str:
        """All that `unpacked` needs."""
        ...


@dataclass(frozen=True, kw_only=True)
class FilePicture:
    """A picture in a file.

    Attributes:
        root: Folder that a relative name starts from.
        name: Its path as given, normalised.
    """

    tag: ClassVar[str] = "file"

    root: Path
    name: str

    @property
    def file_name(self) -> str:
        """Name to store it under."""
        return Path(self.name).name

    @property
    def stamp(self) -> str | None:
        """Size in bytes; None if there is no such file."""
        path = self.root / self.name
        return str(path.stat().st_size) if path.is_file() else None

    def read(self) -> bytes:
        """The file's content."""
        return (self.root / self.name).read_bytes()

    def packed(self) -> str:
        """All that `unpacked` needs."""
        return _packed(self)


@dataclass(frozen=True, kw_only=True)
class SpanPicture:
    """A picture that lies in one piece in a larger file, such as an uncompressed tar archive.

    Attributes:
        file: The larger file.
        member: What the picture is called in it.
        offset: Where its content starts, in bytes.
        size: Its length in bytes.
    """

    tag: ClassVar[str] = "span"

    file: Path
    member: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        """Name of the larger file and of the picture in it."""
        return f"{self.file.name}/{self.member}"

    @property
    def file_name(self) -> str:
        """Name to store it under."""
        return Path(self.member).name

    @property
    def stamp(self) -> str | None:
        """Size in bytes; None if there is no such larger file."""
        return str(self.size) if self.file.is_file() else None

    def read(self) -> bytes:
        """The picture's content.

        Raises:
            ValueError: If the larger file ends before.
        """
        with self.file.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise ValueError(f"{self.file} ends in the middle of {self.member}; copy it again")
        return content

    def packed(self) -> str:
        """All that `unpacked` needs."""
        return _packed(self)


@dataclass(frozen=True, kw_only=True)
class CellPicture:
    """A picture in a cell of a Parquet file.

    Attributes:
        table: The file.
        column: The column.
        group: Number of its row group; None to read a copy of the file.
        row: Number of its row in the group, or in the copy.
        name: Digest of the content.
        file_name: Name to store it under.
    """

    tag: ClassVar[str] = "cell"

    table: Path
    column: str
    group: int | None
    row: int
    name: str
    file_name: str

    @property
    def stamp(self) -> str:
        """The digest of the content."""
        return self.name

    def read(self) -> bytes:
        """The cell's content."""
        if self.group is None:
            value = opened_table(self.table)[self.column][self.row]
        else:
            value = group_column(self.table, self.column, self.group)[self.row].as_py()
        content = cell_bytes(value)
        assert content is not None  # a cell without bytes is no picture
        return content

    def packed(self) -> str:
        """All that `unpacked` needs."""
        return _packed(self)


_KINDS: Sequence[type[FilePicture] | type[SpanPicture] | type[CellPicture]] = (FilePicture, SpanPicture, CellPicture)


def unpacked(content: str) -> Picture:
    """The picture of which `content` is the packed form."""
    tag, fields = json.loads(content)
    made_of = {kind.tag: kind for kind in _KINDS}[tag]
    paths = {name: Path(value) for name, value in fields.items() if name in ("root", "file", "table")}
    return made_of(**{**fields, **paths})


@lru_cache(maxsize=4)
def group_column(path: Path, column: str, group: int) -> Any:
    """A column of a row group of a Parquet file; the last ones are kept, since pictures are asked for in order."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read_row_group(group, columns=[column]).column(0)


@lru_cache(maxsize=64)
def opened_table(path: Path) -> Any:
    """A Parquet file as a `datasets.Dataset` whose pictures are bytes and path, through a copy of the file."""
    import datasets

    dataset = datasets.Dataset.from_parquet(str(path))
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def cell_bytes(value: object) -> bytes | None:
    """The bytes in a cell, if there are any: plain, or beside a path."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return content if isinstance(content, bytes) else None


def _packed(picture: FilePicture | SpanPicture | CellPicture) -> str:
    return json.dumps([picture.tag, vars(picture)], default=str)
