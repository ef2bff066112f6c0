"""Tar shards as img2dataset and WebDataset write them: members of one key are one sample."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from bridgetower.data.images import IMAGE_SUFFIXES, ImageRef
from bridgetower.files import json_object


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a shard holds of one image.

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
