"""Tar shards as img2dataset and WebDataset write them: members of one key are one sample."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from bridgetower.data.locations import IMAGE_SUFFIXES, SpanPicture
from bridgetower.files import parse_json


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a shard says of one picture.

    Attributes:
        key: Path of its members without their ending.
        picture: The first member that is named as a picture; None if there is none.
        text: Content of its `.txt`; empty if there is none.
        details: Content of its `.json`, such as {"url": …, "caption": …}.
    """

    key: str
    picture: SpanPicture | None
    text: str
    details: Mapping[str, Any]

    @property
    def caption(self) -> str:
        """The text, or else the caption among the details."""
        return self.text or str(self.details.get("caption") or "")


def tar_samples(path: Path) -> Iterator[Sample]:
    """Reads the texts of a shard and where its pictures are; pictures are not read.

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
        if member.isfile():
            yield member
    # The module takes half a header for the end; a whole archive ends in blocks of zeros.
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end of the archive")


def _sample(path: Path, archive: tarfile.TarFile, key: str, members: Iterator[tarfile.TarInfo]) -> Sample:
    picture: SpanPicture | None = None
    text, details = "", dict[str, Any]()
    for member in members:
        ending = _key_and_ending(member.name)[1]
        if ending in IMAGE_SUFFIXES and picture is None:
            picture = SpanPicture(file=path, member=member.name, offset=member.offset_data, size=member.size)
        elif ending == ".txt":
            text = _read(path, archive, member).strip()
        elif ending == ".json":
            details = _details(path, archive, member)
    return Sample(key=key, picture=picture, text=text, details=details)


def _read(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = archive.extractfile(member)
    assert file is not None  # only files are asked for
    try:
        return file.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{member.name} in {path} is not UTF-8 ({error}); write the shard again") from error


def _details(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any]:
    content = parse_json(_read(path, archive, member), f"{member.name} in {path}", "write the shard again")
    if not isinstance(content, dict):
        raise ValueError(f"{member.name} in {path} holds a {type(content).__name__}; expected a JSON object")
    return content


def _key_and_ending(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    stem, dot, ending = path.name.partition(".")  # WebDataset: the key ends at the first full stop
    return str(path.parent / stem), (dot + ending).lower()
