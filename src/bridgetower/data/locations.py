"""Where a picture's bytes are: in a file, or in a cell of a Parquet file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Protocol


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
        """Changes when the picture does; None if it is missing."""
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
        """Size and time of change; None if there is no such file."""
        return stamp_of(self.root / self.name)

    def read(self) -> bytes:
        """The file's content."""
        return (self.root / self.name).read_bytes()

    def packed(self) -> str:
        """All that `unpacked` needs."""
        return _packed(self)


@dataclass(frozen=True, kw_only=True)
class CellPicture:
    """A picture in a cell of a Parquet file.

    Attributes:
        table: The file.
        column: The column.
        row: Number of its row.
        name: Digest of the content.
        file_name: Name to store it under.
    """

    tag: ClassVar[str] = "cell"

    table: Path
    column: str
    row: int
    name: str
    file_name: str

    @property
    def stamp(self) -> str:
        """The digest of the content."""
        return self.name

    def read(self) -> bytes:
        """The cell's content."""
        content = cell_bytes(opened_table(self.table)[self.column][self.row])
        assert content is not None  # a cell without bytes became a FilePicture
        return content

    def packed(self) -> str:
        """All that `unpacked` needs."""
        return _packed(self)


_KINDS: Sequence[type[FilePicture] | type[CellPicture]] = (FilePicture, CellPicture)


def unpacked(content: str) -> Picture:
    """The picture of which `content` is the packed form."""
    tag, fields = json.loads(content)
    made_of = {kind.tag: kind for kind in _KINDS}[tag]
    paths = {name: Path(value) for name, value in fields.items() if name in ("root", "table")}
    return made_of(**{**fields, **paths})


def stamp_of(path: Path) -> str | None:
    """Size and time of change of a file; None if there is none."""
    return f"{path.stat().st_size} {path.stat().st_mtime_ns}" if path.is_file() else None


@lru_cache(maxsize=64)
def opened_table(path: Path) -> Any:
    """A Parquet file as a `datasets.Dataset` whose pictures are bytes and path.

    It is copied to the cache of `datasets` first, unless it was already, and the copy stays there: a file from
    elsewhere may have all its rows in one group, so that no single row could be read without the memory for all.
    """
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


def _packed(picture: FilePicture | CellPicture) -> str:
    return json.dumps([picture.tag, vars(picture)], default=str)
