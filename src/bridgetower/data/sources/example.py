"""Examples of images and texts, and the files of a source that they are read from."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from bridgetower.data.sources.column_files import cell_bytes, open_columns
from bridgetower.data.sources.fetch import (
    PATIENT,
    ListedFile,
    Patience,
    is_url,
    read_location,
    version_of,
)

IMAGE_SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".heic",
    ".heif",
    ".jfif",
    ".jpeg",
    ".jpg",
    ".jxl",
    ".png",
    ".tif",
    ".tiff",
    ".webp",
)
"""Endings of files that are read as images; HEIC and JPEG XL may be refused where they are decoded, with advice."""

MAX_SHOWN_PROBLEMS = 10  # in an error or a report


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image of a source: a file of its own, a member of a tar archive, a cell of a table or a frame of a video.

    Attributes:
        name: Identifies the image within its source; of a file, its path from the folder of the source on.
        location: Path or URL of the file that holds the image.
        piece: First byte in that file, and number of bytes.
        cell: Column and row of a Parquet or Arrow file.
        moment: Start and end of a span of a video, in seconds, whose middle frame is the image.
        version: Changes when the file does, as far as a listing tells.
        content: Bytes of the image, if they were read with the source.
        is_inline: Whether the image is base64 in a text, so that only `content` has its bytes.
    """

    name: str
    location: str
    piece: tuple[int, int] | None = None
    cell: tuple[str, int] | None = None
    moment: tuple[float, float] | None = None
    version: str = ""
    content: bytes | None = field(default=None, repr=False, compare=False)
    is_inline: bool = False

    @property
    def is_file(self) -> bool:
        return not (self.piece or self.cell or self.moment or self.is_inline)

    def is_same(self, image: Image) -> bool:
        """Whether two images have one source or the same bytes."""
        has_same_content = self.content is not None and self.content == image.content
        return self == image or has_same_content

    def read(self, patience: Patience = PATIENT) -> bytes:
        """Returns the bytes of the image file, of a frame of a video those of a JPEG."""
        if self.content is not None:
            return self.content
        if self.moment:
            from bridgetower.data.sources.video import frame_of

            start, end = self.moment
            return frame_of(self.location, (start + end) / 2, self.name)
        if not self.cell:
            return read_location(self.location, self.piece, patience=patience)
        column, row = self.cell
        table = open_columns(self.location, version_of(self.location))
        content = cell_bytes(table.value(column, row))
        if content is None:
            raise ValueError(f"{self.location}, row {row + 1} has no image in column {column}")
        return content


@dataclass(frozen=True, kw_only=True)
class Example:
    """A row of a source: images, texts, or both.

    Attributes:
        id: From the source, or the name of its image, or that of its file with the number of its row.
        images: None, one or several.
        texts: Captions, stripped, none empty.
        fields: Other cells of its row, by column.
        split: Split that the source gives it; empty if it gives none.
        origin: File and line, for errors.
        problem: Why it cannot be used; empty if it can.
    """

    id: str
    images: tuple[Image, ...] = ()
    texts: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    split: str = ""
    origin: str = ""
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class FileGroup:
    """Files of a source that are read together: a table, a tar shard, a video, or some images of a folder.

    Attributes:
        kind: Kind of a format of `FORMATS`, or "problem" for a file that cannot be read.
        files: One file, or several images.
        sidecars: Text files and subtitles, by the name of their image or video.
        split: Split that the names of the files give; empty if they give none.
    """

    kind: str
    files: tuple[ListedFile, ...]
    sidecars: Mapping[str, ListedFile] = field(default_factory=dict)
    split: str = ""

    @property
    def version(self) -> str:
        """A text that changes when a file does."""
        marks = [self.kind]
        for file in (*self.files, *self.sidecars.values()):
            marks += [file.location, file.version]
        return " ".join(marks)


def nonempty_texts(texts: Iterable[str]) -> tuple[str, ...]:
    """Returns texts without white space around them, and without empty ones."""
    return tuple(filter(None, map(str.strip, texts)))


def folder_caption(image_name: str) -> tuple[str, ...]:
    """Returns the name of an image's folder as its caption."""
    return nonempty_texts([re.sub(r"[_-]+", " ", PurePosixPath(image_name).parent.name)])


def named_image(file: ListedFile, path: str) -> Image:
    """Returns the image that a file names by a URL, or by a path from its own folder on."""
    if is_url(path):
        return Image(name=path, location=path)
    # The path on this machine, or the URL.
    folder = posixpath.dirname(file.location.partition("?")[0])
    location = posixpath.join(folder, path)
    if not is_url(location):
        location = os.path.normpath(location)

    # The path from the folder of the source on.
    name = posixpath.join(posixpath.dirname(file.name), path)
    return Image(name=posixpath.normpath(name), location=location)


def check_bad(
    source: object,
    problems: Sequence[str],
    max_errors: int,
    outcome: str = "",
    *,
    has_good: bool = True,
) -> None:
    """Raises a ValueError if more items than allowed are bad. `outcome` says what became of the others."""
    num_problems = len(problems)
    if num_problems <= max_errors:
        return
    items = "item" if num_problems == 1 else "items"
    count = f"{num_problems} bad {items} and no good one"
    if has_good:
        count = f"{num_problems} bad {items}, allowed are {max_errors} (max_errors=N allows more)"
    if outcome:
        count += f"; {outcome}"
    details = " | ".join(problems[:MAX_SHOWN_PROBLEMS])
    if num_problems > MAX_SHOWN_PROBLEMS:
        details += f" and {num_problems - MAX_SHOWN_PROBLEMS} more"
    raise ValueError(f"{source}: {count}: {details}")
