"""Where the images of a source are: in files, tar archives or tables; and how their bytes are read."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from bridgetower.files import json_object

IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True, kw_only=True)
class ImageRef:
    """Where an image's bytes are: in a file of its own, in a piece of a tar archive, or in a cell of a table.

    Attributes:
        path: The file.
        name: Identifies the image; rows with the same name are about the same image.
        file_name: Name to store it under.
        piece: Where in an archive its content starts, and its length, in bytes.
        cell: Its column and row in a Parquet or Arrow file.
        signature: Size in bytes, or a digest of the content; None to look at the file.
    """

    path: Path
    name: str
    file_name: str
    piece: tuple[int, int] | None = None
    cell: tuple[str, int] | None = None
    signature: str | None = None

    @classmethod
    def of_file(cls, root: Path, name: str) -> ImageRef:
        """An image in a file of its own, named from a folder on."""
        return cls(path=root / name, name=name, file_name=Path(name).name)

    @property
    def is_file(self) -> bool:
        """Whether the image is a file of its own."""
        return self.piece is None and self.cell is None

    @property
    def file_signature(self) -> str | None:
        """What changes when the image does; None if it is missing.

        It does not tell when the file was written: the same content unpacked again has the same signature.
        """
        if self.signature is not None:
            return self.signature
        return str(self.path.stat().st_size) if self.path.is_file() else None

    def read(self) -> bytes:
        """Returns the content of the image file.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If an archive ends before.
        """
        if self.cell:
            from bridgetower.data.tables import cell_bytes, open_table

            column, row = self.cell
            content = cell_bytes(open_table(self.path).row(row, [column])[column])
            assert content is not None  # a cell without bytes is no image
            return content
        if self.piece is None:
            return self.path.read_bytes()
        start, size = self.piece
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
        places = {name: tuple(values[name]) if values[name] else None for name in ("piece", "cell")}
        return cls(**{**values, **places, "path": Path(values["path"])})


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a tar shard of img2dataset or WebDataset holds of one image: the members of one key.

    Attributes:
        key: Path of its members without their ending.
        image: The first member that is named as an image; None if there is none.
        text: Content of its `.txt`; empty if there is none.
        details: Content of its `.json`, such as {"url": …, "caption": …}.
    """

    key: str
    image: ImageRef | None
    text: str
    details: Mapping[str, Any]

    @property
    def caption(self) -> str:
        """The text, or else the caption among the details."""
        return self.text or str(self.details.get("caption") or "")


def tar_samples(path: Path) -> Iterator[Sample]:
    """Reads the texts of a shard and where its images are; images are not read.

    Raises:
        ValueError: If the file is no tar archive, is cut off, or a text in it cannot be read.
    """
    try:
        # "r:": compressed shards could not be read from the middle.
        with tarfile.open(path, "r:") as archive:
            members = groupby(_files(archive), key=lambda member: _key_and_ending(member.name)[0])
            for key, group in members:
                yield _sample(path, archive, key, group)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is no tar archive, or cut off ({error}); copy it again, uncompressed") from error


def _files(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined] # kept to find members by name, without bound
        if member.issparse():
            raise ValueError(f"{member.name} in {archive.name!s} is a sparse file, of any size; write the shard again")
        if member.isfile():
            yield member
    # The module takes half a header for the end; a whole archive ends in blocks of zeros.
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end of the archive")


def _sample(path: Path, archive: tarfile.TarFile, key: str, members: Iterator[tarfile.TarInfo]) -> Sample:
    image: ImageRef | None = None
    text, details = "", dict[str, Any]()
    for member in members:
        ending = _key_and_ending(member.name)[1]
        if ending in IMAGE_SUFFIXES and image is None:
            image = ImageRef(
                path=path,
                name=f"{path.name}/{member.name}",
                file_name=PurePosixPath(member.name).name,
                piece=(member.offset_data, member.size),
                signature=str(member.size),
            )
        elif ending == ".txt":
            text = _read(path, archive, member).strip()
        elif ending == ".json":
            details = json_object(_read(path, archive, member), f"{member.name} in {path}", "write the shard again")
    return Sample(key=key, image=image, text=text, details=details)


def _read(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = archive.extractfile(member)
    assert file is not None  # only files are asked for
    try:
        return file.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{member.name} in {path} is not UTF-8 ({error}); write the shard again") from error


def _key_and_ending(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    stem, dot, ending = path.name.partition(".")  # WebDataset: the key ends at the first full stop
    return str(path.parent / stem), (dot + ending).lower()
