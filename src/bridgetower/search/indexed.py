"""An image as an index has it: its row, its place in a file, and its bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bridgetower.data.sets.store import Uri
from bridgetower.data.sources.example import Image
from bridgetower.data.sources.fetch import BRIEF, is_url, open_regular
from bridgetower.files import json_object
from bridgetower.plain import from_plain
from bridgetower.processor import check_length
from bridgetower.search.config import Against

CHANGED = "the {} has changed since it was indexed; bring the index up to date"


@dataclass(frozen=True, kw_only=True)
class Location:
    """The place of an image that is not a file at its path."""

    file: str | None = None  # from the root of the index; None: the path of the image
    url: str | None = None
    piece: tuple[int, int] | None = None  # first byte and length in a tar shard
    cell: tuple[str, int] | None = None  # column and row of a table
    moment: tuple[float, float] | None = None  # seconds of a video

    def __post_init__(self) -> None:
        if self.piece:
            start, length = self.piece
            if start < 0 or length <= 0:
                raise ValueError(f"piece is {self.piece}; expected a start and a length")
        if self.cell:
            _, row = self.cell
            if row < 0:
                raise ValueError(f"cell is {self.cell}; expected a column and a row")


@dataclass(frozen=True, kw_only=True)
class Indexed:
    """An image as the index has it."""

    digest: str  # SHA-256 of the file
    path: str  # from the root of the index
    size: int  # of the file, in bytes
    width: int  # of the upright image, in pixels
    height: int
    captions: Sequence[str]
    location: str = ""  # a `Location` as JSON; empty for a file at the path
    # Seconds from the start of the video, for a moment; None for an image.
    start: float | None = None
    end: float | None = None

    @property
    def is_moment(self) -> bool:
        return self.start is not None

    def locate(self) -> Location:
        """Returns the place of the image. Types are checked, as the index may be from someone else."""
        if not self.location:
            return Location()
        try:
            return from_plain(Location, json_object(self.location, "it"), "it")
        except ValueError as error:
            raise ValueError(
                f"the index has {self.location} as the location of {self.path!r}; make the index again"
            ) from error

    def file_in(self, root: Path) -> Path | str:
        """Returns the image file, or the shard, table or video that has the image, or its URL."""
        location = self.locate()
        if location.url:
            return location.url
        return root / (location.file or self.path)


@dataclass(frozen=True, kw_only=True)
class Hit(Indexed):
    """An image that a search found."""

    file: Path | str  # the image, or the shard, table or video that has it, or its URL
    against: Against  # kind of vectors or words that the query was compared with
    cosine: float  # of the vectors of both
    rank_score: float  # of the second stage if the image was matched, else the cosine
    # Whether unrelated texts come as near; None: unknown, or the query is not a text alone.
    weak: bool | None = None
    # That text and image match, if they were matched and the model has a calibration.
    probability: float | None = None
    # Of the matching head, from 0 to 1, if they were matched and the model has no calibration.
    score: float | None = None


def location_of(image: Image, path: str, root: Uri) -> str:
    """Returns the `Location` of an image as JSON, or nothing for a file at its path."""
    is_at_path = os.path.normpath(Path(root) / path) == os.path.normpath(image.location)
    if is_url(image.location):
        location: dict[str, object] = {"url": image.location}
    elif image.is_file and is_at_path:
        return ""
    else:
        location = {"file": os.path.relpath(image.location, root)}
    for name in ("piece", "cell", "moment"):
        if value := getattr(image, name):
            location[name] = value
    return json.dumps(location)


def read_indexed(file: Path | str, image: Indexed) -> bytes:
    """Returns the bytes of an image in a file, if they have the digest that was indexed."""
    location = image.locate()
    if location.piece and location.piece[1] != image.size:  # which limits were checked with
        raise ValueError(
            f"the index has {image.size} bytes, and {location.piece[1]} as the length of the image; make it again"
        )
    check_length(image.path, image.size)
    if not is_url(file):
        with open_regular(file) as opened:
            is_whole_file = not location.piece and not location.cell
            if is_whole_file and os.fstat(opened.fileno()).st_size != image.size:
                raise ValueError(CHANGED.format("image"))
    source = Image(name=image.path, location=str(file), piece=location.piece, cell=location.cell)
    content = source.read(BRIEF)
    if hashlib.sha256(content).hexdigest() != image.digest:
        raise ValueError(CHANGED.format("image"))
    return content
