"""Rows of pictures and captions as a user keeps them: a CSV, JSON-lines or Parquet table, or a folder of pictures."""

import csv
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridgetower.data.config import CaptionsFrom
from bridgetower.data.locations import CellPicture, FilePicture, Picture, cell_bytes, opened_table

IMAGE_COLUMNS = ("image", "image_path", "path", "file", "file_name", "filename", "filepath", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "sentence", "sentences")
SPLIT_COLUMN = "split"
CAPTIONS_FILE = "captions.txt"
IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

_SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_CAPTION_NUMBER = re.compile(r"#\d+$")  # Flickr lists write "1000092795.jpg#0"
_DIGEST_LETTERS = 32

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a source.

    Attributes:
        picture: The picture.
        captions: Its captions as given; they may be empty.
        split: Its split, if the source says.
        place: Where the row is, for error messages.
    """

    picture: Picture
    captions: tuple[str, ...]
    split: str | None = None
    place: str


def read_rows(
    source: Path,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    captions_from: CaptionsFrom = "text",
) -> Iterator[Row]:
    """Reads which pictures and captions a source names; no picture file is opened.

    A Parquet source is copied to the cache of `datasets` first, and the copy stays there: a file from elsewhere may
    have all its rows in one group, so that no single row could be read without the memory for all.

    Args:
        source: A `.csv`, `.tsv`, `.jsonl` or `.parquet` file with an image and a caption column (and perhaps a split
            column), or a folder of pictures with a `captions.txt` or a text file of the same name beside each picture.
        image_column: Name of the column with paths or, in Parquet, picture bytes; None looks for the usual names.
        caption_column: Name of the column with a caption or a list of captions; None looks for the usual names.
        captions_from: "folder" takes the name of the folder that a picture is in as its caption.

    Raises:
        FileNotFoundError: If the source is missing.
        ValueError: If it cannot be read, a column is missing or ambiguous, or an option does not fit the source.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(
            f"no file or folder {source}; give a table of pictures and captions, or a folder of both"
        )
    if source.is_dir():
        if image_column or caption_column:
            raise ValueError(f"{source} is a folder, which has no columns; leave the column names out")
        return _rows_of_folder(source, captions_from)
    if captions_from == "folder":
        raise ValueError(f"captions from folder names need a folder of pictures; {source} is a file")
    read = _READERS.get(source.suffix.lower())
    if read is None:
        raise ValueError(f"{source} is none of {', '.join(_READERS)} and no folder; convert it to one of these")
    return _rows_of_table(source, read(source), image_column, caption_column)


def _rows_of_table(
    source: Path, table: Iterable[Mapping[str, Any]], image_column: str | None, caption_column: str | None
) -> Iterator[Row]:
    for number, cells in enumerate(table, start=1):
        image = cells[_column(source, cells, image_column, IMAGE_COLUMNS, "image")]
        captions = cells[_column(source, cells, caption_column, CAPTION_COLUMNS, "caption")]
        place = f"row {number}"
        yield Row(
            picture=image if isinstance(image, CellPicture) else _file_picture(source.parent, image),
            captions=tuple(map(_text, captions if isinstance(captions, list) else [captions])),
            split=_split_name(source, place, cells[SPLIT_COLUMN]) if SPLIT_COLUMN in cells else None,
            place=place,
        )


def _column(source: Path, cells: Mapping[str, Any], asked: str | None, usual: Sequence[str], what: str) -> str:
    found = [name for name in cells if (name == asked if asked else name.lower() in usual)]
    if len(found) == 1:
        return found[0]
    problem = f"several {what} columns ({', '.join(found)})" if found else f"no column {asked or ', '.join(usual)}"
    raise ValueError(f"{source} has {problem}, it has {', '.join(cells)}; give the name of the {what} column")


def _split_name(source: Path, place: str, value: object) -> str:
    name = _text(value).strip().lower()
    if name not in _SPLIT_NAMES:
        raise ValueError(f"{source}, {place}: split is {name!r}; expected one of {', '.join(_SPLIT_NAMES)}")
    return _SPLIT_NAMES[name]


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _file_picture(root: Path, path: object) -> FilePicture:
    given = _text(path).strip()
    return FilePicture(root=root, name=os.path.normpath(given) if given else "")


def _read_csv(source: Path) -> Iterator[Mapping[str, Any]]:
    delimiter = "\t" if source.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(_lines(source), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row:
                raise ValueError(
                    f"{source}, line {reader.line_num} has more cells than the header; quote commas in captions"
                )
            yield row
    except csv.Error as error:
        raise ValueError(f"{source}, after line {reader.line_num}: {error}; write it as standard CSV") from error


def _read_json_lines(source: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(_lines(source), start=1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}, line {number}: {error}; write one JSON object per line") from error
        if not isinstance(cells, dict):
            raise ValueError(f"{source}, line {number} is a {type(cells).__name__}; write one JSON object per line")
        yield cells


def _read_parquet(source: Path) -> Iterator[Mapping[str, Any]]:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.read_schema(source)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{source} is no Parquet file ({error}); write it again") from error
    cache = datasets.config.HF_DATASETS_CACHE
    logger.info("%s is copied to %s unless it already was; HF_DATASETS_CACHE names another place", source, cache)
    dataset = opened_table(source)
    for number, row in enumerate(dataset):
        yield {name: _cell(source, name, number, value) for name, value in row.items()}


def _cell(source: Path, column: str, row: int, value: object) -> object:
    """Replaces picture bytes by where they are, and a picture that is only a path by the path."""
    content, path = cell_bytes(value), _cell_path(value)
    if content is None:
        return value if path is None else path
    digest = hashlib.sha256(content).hexdigest()[:_DIGEST_LETTERS]
    name = Path(path).name if path else digest
    return CellPicture(table=source, column=column, row=row, name=digest, file_name=name)


def _cell_path(value: object) -> str | None:
    path = value.get("path") if isinstance(value, dict) else None
    return path if isinstance(path, str) else None


_READERS: dict[str, Callable[[Path], Iterator[Mapping[str, Any]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
}


def _rows_of_folder(folder: Path, captions_from: CaptionsFrom) -> Iterator[Row]:
    listed = folder / CAPTIONS_FILE
    if captions_from == "text" and listed.is_file():
        yield from _rows_of_list(listed)
        return
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in sorted(files) if not name.startswith(".")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                name = path.relative_to(folder)
                captions = _folder_caption(name) if captions_from == "folder" else _sidecar_captions(path)
                yield Row(picture=_file_picture(folder, name), captions=captions, place=str(name))


def _folder_caption(name: Path) -> tuple[str, ...]:
    return (re.sub(r"[_-]+", " ", name.parent.name),)


def _sidecar_captions(path: Path) -> tuple[str, ...]:
    text = path.with_suffix(".txt")
    return tuple(line.strip() for line in _lines(text) if line.strip()) if text.is_file() else ()


def _rows_of_list(listed: Path) -> Iterator[Row]:
    """Reads lines "picture TAB caption" or "picture,caption", with or without a header."""
    separator = None
    for number, line in enumerate((line.rstrip("\r\n") for line in _lines(listed) if line.strip()), start=1):
        separator = separator or ("\t" if "\t" in line else ",")
        name, _, caption = line.partition(separator)
        if number == 1 and name.strip().lower() in IMAGE_COLUMNS:
            continue
        picture = _file_picture(listed.parent, _CAPTION_NUMBER.sub("", name.strip()))
        yield Row(picture=picture, captions=(_unquoted(caption.strip()),), place=f"{listed.name} line {number}")


def _unquoted(caption: str) -> str:
    """`caption` without the quotation marks that CSV writers put around one with commas."""
    quoted = len(caption) > 1 and caption[0] == caption[-1] == '"'
    return caption[1:-1].replace('""', '"') if quoted else caption


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
