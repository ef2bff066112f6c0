"""What sources are read into: examples of images and texts, and where the bytes of an image are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bridgetower.data.sources.column_files import cell_bytes, open_columns
from bridgetower.data.sources.fetch import PATIENT, Patience, read_location, version_of

IMAGE_SUFFIXES = frozenset(
    [
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
    ]
)
"""Endings of files that are read as images; HEIC and JPEG XL may be refused where they are decoded, with advice."""

MAX_SHOWN_PROBLEMS = 10  # problems spelt out in an error or a report


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image of a source: a file of its own, a member of a tar archive, a cell of a table or a frame of a video."""

    name: str  # identifies it within its source; a file's path from the folder of the source on
    location: str  # path or URL of the file that it is in
    piece: tuple[int, int] | None = None  # where in that file it starts, and its length in bytes
    cell: tuple[str, int] | None = None  # its column and row in a Parquet or Arrow file
    # start and end in seconds of the part of a video whose middle frame it is
    moment: tuple[float, float] | None = None
    version: str = ""  # what changes when the file does, where the listing tells
    # its bytes, where they were read with the source
    content: bytes | None = field(default=None, repr=False, compare=False)
    is_inline: bool = False  # whether it is base64 in a text, so that only `content` has its bytes

    @property
    def is_file(self) -> bool:
        return not (self.piece or self.cell or self.moment or self.is_inline)

    def read(self, patience: Patience = PATIENT) -> bytes:
        if self.content is not None:
            return self.content
        if self.moment:
            from bridgetower.data.sources.video import frame_of

            return frame_of(self.location, sum(self.moment) / 2, self.name)
        if self.cell:
            column, row = self.cell
            content = cell_bytes(
                open_columns(self.location, version_of(self.location)).value(column, row)
            )
            if content is None:
                raise ValueError(f"{self.location}, row {row + 1} has no image in column {column}")
            return content
        return read_location(self.location, self.piece, patience=patience)

    def located(self) -> str:
        """Returns where it is within its file as JSON; empty of a file of its own."""
        within = {"piece": self.piece, "cell": self.cell, "moment": self.moment}
        return (
            ""
            if self.is_file
            else json.dumps({name: location for name, location in within.items() if location})
        )


@dataclass(frozen=True, kw_only=True)
class Example:
    """A row of a source: images, texts, or both."""

    id: str  # from the source, or the name of its image, or that of its file with the number of its row
    images: tuple[Image, ...] = ()  # none, one or several
    texts: tuple[str, ...] = ()  # captions, stripped, none empty
    fields: Mapping[str, Any] = field(default_factory=dict)  # all other cells of its row, by column
    split: str = ""  # that the source gives it; empty if it gives none
    origin: str = ""  # file and line, for errors
    problem: str = ""  # why it cannot be used; empty if it can


def check_bad(
    source: object,
    problems: Sequence[str],
    max_errors: int,
    others: str = "",
    *,
    has_good: bool = True,
) -> None:
    """Raises a ValueError if more than allowed could not be used; `others` says what became of the rest."""
    if len(problems) > max_errors:
        shown = " | ".join(problems[:MAX_SHOWN_PROBLEMS])
        more = (
            f" and {len(problems) - MAX_SHOWN_PROBLEMS} more"
            if len(problems) > MAX_SHOWN_PROBLEMS
            else ""
        )
        bad = f"{len(problems)} bad item{'s' if len(problems) > 1 else ''}"
        allowed = (
            f", allowed are {max_errors} (max_errors=N allows more)"
            if has_good
            else " and no good one"
        )
        kept = f"; {others}" if others else ""
        raise ValueError(f"{source}: {bad}{allowed}{kept}: {shown}{more}")
