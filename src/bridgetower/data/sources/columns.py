"""Columns of tables: the headings that are recognised, and errors that say which column is missing."""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

from bridgetower.data.config import Cutting
from bridgetower.data.sources.example import IMAGE_SUFFIXES, Image
from bridgetower.data.sources.fetch import ListedFile, is_url, suffix_of
from bridgetower.files import shortened

logger = logging.getLogger(__name__)

CaptionsFrom = Literal["text", "folder"]


@dataclass(frozen=True, kw_only=True)
class Headings:
    """Names of columns with one kind of content, in lower case and with `_` for spaces.

    Attributes:
        noun: Names the content in messages.
        option: Option that names another column; empty if there is none.
        usual: Names that are recognised.
        second: Names that are recognised where no column has a usual one.
        likely: Names that are recognised, with a line in the log, where no column has one of the others and only one
            column has one of these.
    """

    noun: str
    option: str
    usual: tuple[str, ...]
    second: tuple[str, ...] = ()
    likely: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.usual, *self.second, *self.likely)

    @property
    def advice(self) -> str:
        """What to do where no column has one of the names."""
        return f"give {self.option} its name, or rename it to {self.usual[0]}"


IMAGES = Headings(
    noun="images",
    option="image_column",
    usual=(
        "image",
        "image_path",
        "path",
        "file",
        "file_name",
        "filename",
        "filepath",
        "img",
        "jpg",
    ),
    second=("url", "image_url"),
    likely=(
        "images",
        "image_name",
        "image_file",
        "image_filename",
        "img_name",
        "img_path",
        "img_file",
        "photo",
        "photo_path",
        "picture",
        "picture_path",
        "pic",
        "img_url",
        "photo_url",
        "picture_url",
        "image_link",
    ),
)
CAPTIONS = Headings(
    noun="texts",
    option="text_column",
    usual=("caption", "captions", "text", "sentence", "sentences"),
    likely=(
        "comment",
        "comments",
        "description",
        "alt",
        "alt_text",
        "image_caption",
        "image_description",
    ),
)
IDS = Headings(noun="ids", option="id_column", usual=("id", "image_id", "key", "uid"))
SPLIT_NAMES = Headings(noun="splits", option="", usual=("split",))
PAIRS_OF_IMAGES = (
    ("image_0", "image_1"),
    ("image_1", "image_2"),
    ("image1", "image2"),
    ("left", "right"),
)

# Columns of formats that are not read, with advice.
_FOREIGN_COLUMNS = {
    "conversations": "a conversation is not read: write a row for each question, with image, question and answer",
    "annotations": "nested rows are not read: export a CSV, or JSON-MIN of Label Studio",
}


class ColumnError(ValueError):
    """A table lacks a required column, or several columns have the same meaning."""


@dataclass(frozen=True, kw_only=True)
class RequiredColumn:
    """A column that a table must have, under one of `headings` or of `alternatives`, which error messages leave out."""

    headings: tuple[Headings, ...]
    alternatives: tuple[Headings, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of tables that are read, and how videos are cut.

    Attributes:
        image: Column with paths, URLs or bytes of images, or the two columns of pairs of images, joined by a comma.
            None, here and in `text` and `id`, takes a column with a usual name.
        text: Column with a caption or a list of captions.
        id: Column that names the rows.
        captions_from: "folder" takes the name of an image's folder as its caption.
        cutting: How videos become moments.
        required: Columns that a table must have.
        text_option: Option that errors name for `text`.
    """

    image: str | None = None
    text: str | None = None
    id: str | None = None
    captions_from: CaptionsFrom = "text"
    cutting: Cutting = field(default_factory=Cutting)
    required: tuple[RequiredColumn, ...] = ()
    text_option: str = CAPTIONS.option

    @property
    def named(self) -> set[str]:
        """Names of columns that a table must have because the user named them."""
        return {*(self.image or "").split(","), self.text or "", self.id or ""} - {""}


@dataclass(frozen=True, kw_only=True)
class ColumnRoles:
    """The names of a row's columns by their content, empty where there is none."""

    images: tuple[str, ...]
    text: str
    id: str
    split: str

    def has(self, required: RequiredColumn, names: Sequence[str]) -> bool:
        """Returns whether one of a row's columns, with these names, is the required one."""
        # Columns of images and texts may have any name, others have a usual one.
        columns = {IMAGES.noun: self.images, CAPTIONS.noun: self.text}
        return any(
            columns.get(headings.noun) or columns_named(names, headings.names)
            for headings in (*required.headings, *required.alternatives)
        )


def roles_of(file: ListedFile, cells: Mapping[str, Any], columns: Columns) -> ColumnRoles:
    """Finds what the columns of a row hold."""
    captions = replace(CAPTIONS, option=columns.text_option)
    return ColumnRoles(
        images=image_columns(file, cells, columns),
        text=_recognised_column(file, cells, captions, columns.text),
        id=_recognised_column(file, cells, IDS, columns.id),
        split=_recognised_column(file, cells, SPLIT_NAMES),
    )


def image_columns(file: ListedFile, cells: Mapping[str, Any], columns: Columns) -> tuple[str, ...]:
    """Returns the columns that the user named, else a usual pair, else those that hold images, else a usual name."""
    if columns.image:
        return tuple(name for name in columns.image.split(",") if name in cells)
    for pair in PAIRS_OF_IMAGES:
        if all(name in cells for name in pair):
            return pair
    if images := tuple(name for name, cell in cells.items() if isinstance(cell, Image)):
        return images
    name = _recognised_column(file, cells, IMAGES)
    return (name,) if name else ()


def _recognised_column(
    file: ListedFile, names: Iterable[str], headings: Headings, named_column: str | None = None
) -> str:
    """Returns the column that the user named, else one with a usual, a second or the only likely name, else ""."""
    if named_column:
        return named_column if named_column in names else ""
    usual = columns_named(names, headings.usual) or columns_named(names, headings.second)
    if len(usual) > 1:
        advice = f"give {headings.option} one of them" if headings.option else "rename one"
        raise ColumnError(
            f"{file.name} has several columns of {headings.noun} ({listed_names(usual)}); {advice}"
        )
    if usual:
        return usual[0]
    likely = columns_named(names, headings.likely)
    if len(likely) != 1:
        return ""
    note_likely(posixpath.dirname(file.location), likely[0], headings)
    return likely[0]


def columns_named(names: Iterable[str], headings: Sequence[str]) -> list[str]:
    """Returns the names that are one of the headings, whatever their case, with a space or a hyphen for `_`."""
    return [name for name in names if re.sub(r"[\s-]+", "_", name.strip().lower()) in headings]


@cache
def note_likely(folder: str, column: str, headings: Headings) -> None:
    """Logs that a column was recognised by a likely name. The cache keeps it to one line for each `folder`."""
    logger.info(
        "the column %r is taken for %s; name another one if that is wrong", column, headings.noun
    )


def missing_column_message(
    file: ListedFile,
    missing: RequiredColumn,
    names: Sequence[str],
    required: Sequence[RequiredColumn],
) -> str:
    """Says which column is missing, which columns a table has, and what to do."""
    nouns = " or ".join(headings.noun for headings in missing.headings)
    message = f"{file.name} has no column of {nouns}; it has {listed_names(names)}"
    for name, advice in _FOREIGN_COLUMNS.items():
        if name in names:
            return f"{message}; {advice}"
    if any(is_url(name) or suffix_of(name) in IMAGE_SUFFIXES for name in names):
        header = ",".join(column.headings[0].usual[0] for column in required)
        return (
            f"{message}: its first row seems to be data; write a header above it, such as {header}"
        )
    return f"{message}; {missing.headings[0].advice}"


def listed_names(names: Iterable[str]) -> str:
    """Returns names of columns for an error, quoted where they begin or end with a space."""
    quoted = [repr(name) if name != name.strip() or not name else name for name in names]
    return shortened(", ".join(quoted))
