"""Tables: rows of CSV, JSON, Parquet and Arrow files as examples."""

from __future__ import annotations

import base64
import binascii
import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from typing import Any

from bridgetower.data.sources.column_files import ColumnFile, cell_bytes
from bridgetower.data.sources.columns import (
    ColumnError,
    ColumnRoles,
    Columns,
    listed_names,
    missing_column_message,
    roles_of,
)
from bridgetower.data.sources.example import (
    Example,
    FileGroup,
    Image,
    folder_caption,
    named_image,
    nonempty_texts,
)
from bridgetower.data.sources.fetch import ListedFile, suffix_of
from bridgetower.data.sources.json_lists import JsonLists
from bridgetower.data.sources.text_files import (
    MAX_TEXT_LENGTH,
    length_problem,
    lines_of,
    open_decompressed,
)

SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
"""Splits as sources name them, and their names here."""

MAX_ROW_LENGTH = 2**24  # characters of a row, which may have images as base64

_STATED_DELIMITER = re.compile(r"sep=(.)\s*")  # a first line for Excel
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII | re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/]{64}[A-Za-z0-9+/\s]*={0,2}\s*")
_IMAGE_HEAD = re.compile(  # of JPEG, PNG, GIF, WebP, BMP, TIFF, and AVIF or HEIC
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|....ftyp", re.DOTALL
)

Rows = Iterator[tuple[str, dict[str, Any] | str]]
"""Rows of a table with their origin: their cells by column, or what is wrong with them."""


def read_table(group: FileGroup, columns: Columns) -> Iterator[Example]:
    """Yields an example for each row. That of a wrong row has a problem, and the next rows follow."""
    (file,) = group.files
    names: tuple[str, ...] = ()
    missing_named = columns.named
    missing_required = list(columns.required)
    suffix = suffix_of(file.location).split(".")[1]
    read_rows = ROW_READERS[f".{suffix}"]
    for number, (origin, cells) in enumerate(read_rows(file), start=1):
        row_id = f"{file.name}/{number}"
        if isinstance(cells, str):
            yield Example(id=row_id, origin=origin, problem=cells)
            continue
        if tuple(cells) != names:
            names = tuple(cells)
            roles = roles_of(file, cells, columns)
            missing_named.difference_update(names)
            missing_required = [
                column for column in missing_required if not roles.has(column, names)
            ]
            # Only rows of JSON differ in their columns.
            if (missing_named or missing_required) and read_rows is not _json_rows:
                break
        try:
            example = _read_row(file, number, origin, cells, roles, columns)
        except ValueError as error:
            example = Example(id=row_id, origin=origin, problem=str(error))
        yield example
    if names and missing_named:
        raise ColumnError(
            f"no row of {file.name} has a column {', '.join(sorted(missing_named))}; "
            f"it has {listed_names(names)}"
        )
    if names and missing_required:
        raise ColumnError(
            missing_column_message(file, missing_required[0], names, columns.required)
        )


def _read_row(
    file: ListedFile,
    number: int,
    origin: str,
    cells: Mapping[str, Any],
    roles: ColumnRoles,
    columns: Columns,
) -> Example:
    images = _images_in_row(file, number, cells, roles)
    texts = nonempty_texts(map(_cell_text, _as_list(cells.get(roles.text))))
    if columns.captions_from == "folder" and images:
        texts = folder_caption(images[0].name)
    fields = {
        name: cell
        for name, cell in cells.items()
        if name not in (*roles.images, roles.text, roles.split)
    }
    strings = (cell for name, cell in cells.items() if name not in roles.images)
    for text in (*texts, *strings):
        if isinstance(text, str) and len(text) > MAX_TEXT_LENGTH:
            raise ValueError(length_problem(MAX_TEXT_LENGTH))

    split = _cell_text(cells.get(roles.split)).strip().lower()
    is_split = not split or split in SPLITS
    has_file = len(images) == 1 and images[0].is_file
    default_id = images[0].name if has_file else f"{file.name}/{number}"
    return Example(
        id=_cell_text(cells.get(roles.id)) or default_id,
        images=tuple(images),
        texts=texts,
        fields=fields,
        split=SPLITS.get(split, split),
        origin=origin,
        problem="" if is_split else f"split is {split!r}; expected one of {', '.join(SPLITS)}",
    )


def _images_in_row(
    file: ListedFile, number: int, cells: Mapping[str, Any], roles: ColumnRoles
) -> list[Image]:
    """Returns the images of a row, which are bytes in its cells, base64, or names of files."""
    images = list[Image]()
    for column in roles.images:
        for cell in _as_list(cells[column]):
            if isinstance(cell, Image):
                images.append(cell)
            elif text := _cell_text(cell):
                images.append(_image_in_text(file, text, f"{file.name}/{column} {number}"))
    return images


def _image_in_text(file: ListedFile, text: str, name: str) -> Image:
    """Returns the image that a text holds as base64, or names."""
    data_url = _DATA_URL.match(text)
    if not data_url and not _BASE64.fullmatch(text):
        return named_image(file, text)
    encoded = text[data_url.end() :] if data_url else text
    try:
        content = base64.b64decode("".join(encoded.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"the base64 of its image is damaged ({error}); write it again") from error
    # A long path may look like base64.
    if not data_url and not _IMAGE_HEAD.match(content):
        return named_image(file, text)
    return Image(
        name=name,
        location=file.location,
        version=file.version,
        content=content,
        is_inline=True,
    )


def _as_list(cell: object) -> list[Any]:
    return cell if isinstance(cell, list) else [cell]


def _cell_text(cell: object) -> str:
    """Returns the text in a cell. NaN, as pandas writes it, is none."""
    return "" if cell is None or cell != cell else str(cell)


class _RowLines:
    """Lines of a CSV file, of which those of a row have a limited length together."""

    def __init__(self, lines: Iterator[str], number: int) -> None:
        self.number = number
        self.num_left = MAX_ROW_LENGTH  # characters of the row
        self._lines = lines

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        self.num_left -= len(line)
        if self.num_left < 0:
            raise csv.Error(length_problem(MAX_ROW_LENGTH))
        return line


def _csv_rows(file: ListedFile) -> Rows:
    # The delimiter is stated, or that of the ending, or the most frequent one of the first line.
    lines = lines_of(file, MAX_ROW_LENGTH)
    header = next(lines, "")
    stated = _STATED_DELIMITER.fullmatch(header)
    if stated:
        delimiter = stated[1]
        header = next(lines, "")
    elif suffix_of(file.location).startswith(".tsv"):
        delimiter = "\t"
    else:
        delimiter = max(",;\t|", key=header.count)

    # The limit of a field is one of the process, for all its readers.
    csv.field_size_limit(max(MAX_ROW_LENGTH, csv.field_size_limit()))
    row_lines = _RowLines(chain([header], lines), number=1 if stated else 0)
    reader = csv.DictReader(row_lines, delimiter=delimiter, strict=True)
    for name, count in Counter(reader.fieldnames or ()).items():
        if "\0" in name:  # as of UTF-16 without a byte order mark
            raise ColumnError(
                f"{file.name} has zero characters in its first line; save it as UTF-8"
            )
        if name and count > 1:
            raise ColumnError(
                f"{file.name} has the column {name} twice; give each a name of its own"
            )

    while True:
        origin = f"{file.name} line {row_lines.number + 1}"
        row_lines.num_left = MAX_ROW_LENGTH
        try:
            row: dict[Any, Any] = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield origin, f"{error}; write it as standard CSV"
            continue
        if None in row:
            yield origin, "it has more cells than the header; quote texts that have the delimiter"
        else:
            yield origin, row


def _json_rows(file: ListedFile) -> Rows:
    """Reads JSON lines, or one list of objects, also as the only list of an object."""
    has_ending = suffix_of(file.location).startswith((".jsonl", ".ndjson"))
    if not has_ending and not _has_lines_of_objects(file):
        with open_decompressed(file.location) as stream:
            for number, item in enumerate(JsonLists(stream, file.name).items(), start=1):
                yield f"{file.name} row {number}", _object_or_problem(item)
        return
    for number, line in enumerate(lines_of(file, MAX_ROW_LENGTH), start=1):
        if not line.strip():
            continue
        try:
            if len(line) > MAX_ROW_LENGTH:
                row: dict[str, Any] | str = length_problem(MAX_ROW_LENGTH)
            else:
                row = _object_or_problem(json.loads(line))
        except (ValueError, RecursionError) as error:
            row = f"it is not valid JSON ({error})"
        yield f"{file.name} line {number}", row


def _object_or_problem(value: object) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else "it is no JSON object"


def _has_lines_of_objects(file: ListedFile) -> bool:
    """Returns whether a file has an object in its first line and another one after it."""
    with io.BufferedReader(open_decompressed(file.location)) as stream:
        head = stream.peek()
    if not head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
        return False
    lines = filter(None, map(str.strip, lines_of(file, MAX_ROW_LENGTH)))
    return next(lines, "").endswith("}") and next(lines, "").startswith("{")


def _column_rows(file: ListedFile) -> Rows:
    """Reads a Parquet or Arrow file. Cells with the bytes of an image become images, and classes their names."""
    table = ColumnFile(file.location)
    class_names: dict[str, list[str]] = {}
    # As `datasets` writes them.
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        class_names = {
            name: list(feature["names"])
            for name, feature in features.items()
            if feature.get("_type") == "ClassLabel"
        }
    rows = (cells for batch in table.batches() for cells in batch.to_pylist())
    for number, cells in enumerate(rows, start=1):
        for column, value in cells.items():
            content = cell_bytes(value)
            names = class_names.get(column, ())
            if content is not None:
                cells[column] = Image(
                    name=f"{file.name}/{column} {number}",
                    location=file.location,
                    cell=(column, number - 1),
                    version=file.version,
                    content=content,
                )
            elif isinstance(value, dict) and "bytes" in value:
                cells[column] = value.get("path")
            elif isinstance(value, int) and 0 <= value < len(names):
                cells[column] = names[value]
        yield f"{file.name} row {number}", cells


ROW_READERS: dict[str, Callable[[ListedFile], Rows]] = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".parquet": _column_rows,
    ".arrow": _column_rows,
}
"""Readers of the rows of a table, by the ending of its file."""
