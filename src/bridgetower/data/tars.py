"""Tar shards of img2dataset and WebDataset: where their images are, and the texts beside them."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, Self

from bridgetower.data.images import IMAGE_SUFFIXES, MAX_TEXT, ImageRef, check_text
from bridgetower.files import json_object

_LONG_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


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
    """Reads the texts of a shard and where its images are; images are not read."""
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is no file; remove it")
    try:
        # "r:": compressed shards could not be read from the middle.
        with tarfile.open(path, "r:", tarinfo=_Header) as archive:
            members = groupby(_files(archive), key=lambda member: _key_and_ending(member.name)[0])
            for key, group in members:
                yield _sample(path, archive, key, group)
    except (tarfile.TarError, EOFError, RecursionError) as error:  # of headers that follow headers without end
        raise ValueError(f"{path} is no tar archive, or cut off ({error}); copy it again, uncompressed") from error


class _Header(tarfile.TarInfo):
    """A header, which may be followed by the long name of a member, but not by one of any length."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _LONG_HEADERS and not 0 <= header.size <= MAX_TEXT:
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


def _files(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    assert archive.fileobj is not None
    end = Path(os.fsdecode(archive.name or "")).stat().st_size
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined] # kept to find members by name, without bound
        if member.issparse():
            raise ValueError(f"{member.name} in {archive.name!s} is a sparse file, of any size; write the shard again")
        if not 0 <= member.size <= end:
            raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
        if member.isfile():
            yield member
    # The module takes half a header for the end; a whole archive ends in blocks of zeros.
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
    check_text(f"{member.name} in {path}", member.size)
    file = archive.extractfile(member)
    assert file is not None  # only files are passed
    try:
        return file.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{member.name} in {path} is not UTF-8 ({error}); write the shard again") from error


def _key_and_ending(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    stem, dot, ending = path.name.partition(".")  # WebDataset: the key ends at the first full stop
    return str(path.parent / stem), (dot + ending).lower()
