"""Tar shards of WebDataset and img2dataset."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from bridgetower.data.sources.columns import Columns
from bridgetower.data.sources.example import (
    IMAGE_SUFFIXES,
    Example,
    FileGroup,
    Image,
    nonempty_texts,
)
from bridgetower.data.sources.fetch import ListedFile, is_url, open_location

_LARGEST_HEADER = 2**20  # bytes of the headers of a member
# Bytes of a member that is read, by its ending.
_LARGEST_MEMBERS = {**dict.fromkeys(IMAGE_SUFFIXES, 2**29), ".txt": 2**20, ".json": 2**20}


class _Member(NamedTuple):
    """A file of a shard: the name is `KEY.SUFFIX`."""

    key: str
    suffix: str
    info: tarfile.TarInfo


class _Headers:
    """A tar archive of which only headers are read, up to a limit for each member."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek = file.seek
        self.tell = file.tell
        self._read = file.read
        self.num_left = _LARGEST_HEADER

    def read(self, size: int) -> bytes:
        self.num_left -= size
        if size < 0 or self.num_left < 0:
            raise tarfile.ReadError(f"a header has more than {_LARGEST_HEADER} bytes")
        return self._read(size)


def read_shard(group: FileGroup, columns: Columns) -> Iterator[Example]:
    """Yields an example for each key, whose members are an image, its `.txt` and its `.json`."""
    (file,) = group.files
    hashes = set[int]()
    with open_location(file.location) as stream:
        try:
            for key, members in groupby(_members(stream), attrgetter("key")):
                example = _read_example(file, key, members, stream)
                if hash(key) in hashes:
                    problem = "the shard has its key twice; write it again"
                    example = replace(example, problem=problem)
                hashes.add(hash(key))
                yield example
        except (tarfile.TarError, ValueError, EOFError, RecursionError, OverflowError) as error:
            problem = f"it is no tar archive, or cut off ({error}); copy it again"
            yield Example(id=file.name, origin=file.name, problem=problem)


def _members(stream: BinaryIO) -> Iterator[_Member]:
    headers = _Headers(stream)
    with tarfile.open(fileobj=headers, mode="r:") as archive:  # type: ignore[call-overload]
        while (member := archive.next()) is not None:
            if member.size < 0:
                raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
            if member.isfile():
                # The key ends at the first full stop of the name, as in WebDataset.
                path = PurePosixPath(member.name)
                name, dot, ending = path.name.partition(".")
                yield _Member(str(path.parent / name), dot + ending.lower(), member)
            # tarfile keeps these to find members by name, without bound.
            archive.members = []
            archive.pax_headers = {}
            headers.num_left = _LARGEST_HEADER
        # tarfile takes half a header for the end.
        stream.seek(archive.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end of the archive")


def _read_member(stream: BinaryIO, member: tarfile.TarInfo) -> bytes:
    stream.seek(member.offset_data)
    return stream.read(member.size)


def _read_example(
    file: ListedFile, key: str, members: Iterable[_Member], stream: BinaryIO
) -> Example:
    images = list[Image]()
    fields = dict[str, Any]()
    caption: object = None
    problem = ""
    for _, suffix, member in members:
        limit = _LARGEST_MEMBERS.get(suffix)
        if limit is None:
            continue
        if member.issparse():
            problem = f"{member.name} is stored as a sparse file; pack the shard without --sparse"
            continue
        if member.size > limit:
            problem = f"{member.name} has {member.size} bytes; expected at most {limit}"
            continue

        try:
            if suffix in IMAGE_SUFFIXES:
                # Images of local shards are read when they are used.
                is_remote = is_url(file.location)
                image = Image(
                    name=f"{file.name}/{member.name}",
                    location=file.location,
                    piece=(member.offset_data, member.size),
                    version=file.version,
                    content=_read_member(stream, member) if is_remote else None,
                )
                images.append(image)
            elif suffix == ".txt":
                caption = _read_member(stream, member).decode()
            else:
                parsed = json.loads(_read_member(stream, member))
                fields = parsed if isinstance(parsed, dict) else {"json": parsed}
        except (ValueError, RecursionError) as error:
            problem = f"{member.name} cannot be read ({error})"
    if caption is None:
        caption = fields.get("caption")
    if not images:
        problem = problem or "there is no image of this key"
    return Example(
        id=key,
        images=tuple(images),
        texts=nonempty_texts([caption]) if isinstance(caption, str) else (),
        fields=fields,
        origin=f"{key} in {file.name}",
        problem=problem,
    )
