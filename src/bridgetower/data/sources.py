"""Rows of images and captions as a user keeps them: a table, a folder of images, or tar shards."""

import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridgetower.data.config import CaptionsFrom, TableConfig
from bridgetower.data.images import IMAGE_SUFFIXES, ImageRef, tar_samples
from bridgetower.data.tables import parquet_rows
from bridgetower.files import json_object

IMAGE_COLUMNS = ("image", "image_path", "path", "file", "file_name", "filename", "filepath", "img", "jpg")
CAPTION_COLUMNS = ("caption", "captions", "text", "sentence", "sentences")
TEXT_COLUMNS = (*CAPTION_COLUMNS, "title", "description")
LABEL_COLUMNS = ("label", "labels", "class", "category", "categories", "tags")
SPLIT_COLUMN = "split"
ID_COLUMN = "id"
CAPTIONS_FILE = "captions.txt"

_SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_CAPTION_NUMBER = re.compile(r"#\d+$")  # Flickr lists write "1000092795.jpg#0"
TAR_SUFFIX = ".tar"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a source.

    Attributes:
        image: The image.
        captions: Its captions as given; they may be empty.
        split: Its split, if the source says.
        place: Where the row is, for error messages.
    """

    image: ImageRef
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
    """Reads which images and captions a source names; no image file is opened.

    Args:
        source: A `.csv`, `.tsv`, `.jsonl` or `.parquet` file with an image and a caption column (and perhaps a split
            column); a folder of images with a `captions.txt` or a text file of the same name beside each image; or
            a `.tar` file or a folder of them, in which members of one key are an image and its caption.
        image_column: Name of the column with paths or, in Parquet, image bytes; None looks for the usual names.
        caption_column: Name of the column with a caption or a list of captions; None looks for the usual names.
        captions_from: "folder" takes the name of the folder that an image is in as its caption.

    Raises:
        FileNotFoundError: If the source is missing.
        ValueError: If it cannot be read, a column is missing or ambiguous, or an option does not fit the source.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"no file or folder {source}; give a table of images and captions, or a folder of both")
    is_tar = source.suffix.lower() == TAR_SUFFIX
    if (source.is_dir() or is_tar) and (image_column or caption_column):
        raise ValueError(f"{source} is a folder or archive, which has no columns; leave the column names out")
    if source.is_dir():
        return _rows_of_folder(source, captions_from)
    if captions_from == "folder":
        raise ValueError(f"captions from folder names need a folder of images; {source} is a file")
    if is_tar:
        return _rows_of_shards([source])
    read = _READERS.get(source.suffix.lower())
    if read is None:
        raise ValueError(f"{source} is none of {', '.join((*_READERS, TAR_SUFFIX))} and no folder; convert it to one")
    return _rows_of_table(source, read(source), image_column, caption_column)


@dataclass(frozen=True, kw_only=True)
class LabelledRow:
    """One row of a table with labels.

    Attributes:
        id: As the column `id` has it, or the number of the row.
        image: The image; None if the row has none.
        text: The text as given; empty if the row has none.
        labels: Names of the classes; None if they are not known.
        several: Whether the row may have several labels: it holds a list, or a separator was given.
        split: Its split, if the source says.
        place: Where the row is, for error messages.
    """

    id: str
    image: ImageRef | None
    text: str
    labels: tuple[str, ...] | None
    several: bool
    split: str | None = None
    place: str


def read_labelled(source: Path, config: TableConfig) -> Iterator[LabelledRow]:
    """Reads which images, texts and labels a table names; no image file is opened.

    A cell without a value is an unknown label; of several labels, an empty list or cell says that no class holds.

    Args:
        source: A `.csv`, `.tsv`, `.jsonl` or `.parquet` file with a column of labels, and one of images or of texts.
        config: Names of the columns.

    Raises:
        FileNotFoundError: If the source is missing.
        ValueError: If it cannot be read, or a column is missing or ambiguous.
    """
    source = Path(source)
    if not source.is_file():
        raise FileNotFoundError(f"no file {source}; give a table of images, texts and labels")
    read = _READERS.get(source.suffix.lower())
    if read is None:
        raise ValueError(f"{source} is none of {', '.join(_READERS)}; convert it to one")
    for number, cells in enumerate(read(source), start=1):
        place = f"row {number}"
        image_column = _columns(source, cells, config.image_column, IMAGE_COLUMNS, "image", optional=True)
        text_column = _columns(source, cells, config.text_column, TEXT_COLUMNS, "text", optional=True)
        if not image_column and not text_column:
            raise ValueError(f"{source} has no column of images and none of texts; it has {', '.join(cells)}: name one")
        (label_column,) = _columns(source, cells, config.label_column, LABEL_COLUMNS, "label")
        label, split = cells[label_column], cells.get(SPLIT_COLUMN)
        image = next((cells[name] for name in image_column), None)
        yield LabelledRow(
            id=_text(cells.get(ID_COLUMN)).strip() or str(number),
            image=_image_file(source.parent, image) if image else None,
            text=next((_text(cells[name]) for name in text_column), ""),
            labels=_labels(label, config.label_separator),
            several=isinstance(label, list) or config.label_separator is not None,
            split=None if split is None else _split_name(source, place, split),
            place=place,
        )


def _labels(cell: object, separator: str | None) -> tuple[str, ...] | None:
    """The labels in a cell, each once; None if they are not known."""
    if cell is None or (separator is None and cell == ""):
        return None
    parts = cell if isinstance(cell, list) else str(cell).split(separator) if separator else [cell]
    return tuple(dict.fromkeys(name for name in (_text(part).strip() for part in parts) if name))


def _rows_of_table(
    source: Path, table: Iterable[Mapping[str, Any]], image_column: str | None, caption_column: str | None
) -> Iterator[Row]:
    for number, cells in enumerate(table, start=1):
        (image,) = _columns(source, cells, image_column, IMAGE_COLUMNS, "image")
        (caption,) = _columns(source, cells, caption_column, CAPTION_COLUMNS, "caption")
        captions = cells[caption]
        place = f"row {number}"
        yield Row(
            image=_image_file(source.parent, cells[image]),
            captions=tuple(map(_text, captions if isinstance(captions, list) else [captions])),
            split=_split_name(source, place, cells[SPLIT_COLUMN]) if SPLIT_COLUMN in cells else None,
            place=place,
        )


def _columns(
    source: Path,
    cells: Mapping[str, Any],
    asked: str | None,
    usual: Sequence[str],
    what: str,
    *,
    optional: bool = False,
) -> list[str]:
    """Returns the name of the one column; nothing if there is none, none is asked for, and it is optional."""
    found = [name for name in cells if (name == asked if asked else name.lower() in usual)]
    if len(found) == 1 or (optional and not found and not asked):
        return found
    problem = f"several {what} columns ({', '.join(found)})" if found else f"no column {asked or ', '.join(usual)}"
    raise ValueError(f"{source} has {problem}, it has {', '.join(cells)}; give the name of the {what} column")


def _split_name(source: Path, place: str, value: object) -> str:
    name = _text(value).strip().lower()
    if name not in _SPLIT_NAMES:
        raise ValueError(f"{source}, {place}: split is {name!r}; expected one of {', '.join(_SPLIT_NAMES)}")
    return _SPLIT_NAMES[name]


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _image_file(root: Path, cell: object) -> ImageRef:
    """The image in a cell, or the file that the cell names."""
    if isinstance(cell, ImageRef):
        return cell
    given = _text(cell)
    return ImageRef.of_file(root, os.path.normpath(given) if given else "")


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
        yield json_object(line, f"{source}, line {number}", "write one JSON object per line")


_READERS: dict[str, Callable[[Path], Iterator[Mapping[str, Any]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": parquet_rows,
}


def _rows_of_folder(folder: Path, captions_from: CaptionsFrom) -> Iterator[Row]:
    if captions_from == "folder":
        for name in _images_in(folder):
            yield Row(image=_image_file(folder, name), captions=_folder_caption(name), place=str(name))
        return
    listed = folder / CAPTIONS_FILE
    shards = sorted(path for path in folder.iterdir() if path.suffix.lower() == TAR_SUFFIX)
    beside = Path(CAPTIONS_FILE) if listed.is_file() else next(_images_in(folder), None)
    if shards and beside:
        raise ValueError(
            f"{folder} has both tar shards ({shards[0].name}) and {beside}; move the shards, or the rest, to a folder "
            "of their own"
        )
    if shards:
        yield from _rows_of_shards(shards)
    elif listed.is_file():
        yield from _rows_of_list(listed)
    else:
        for name in _images_in(folder):
            captions = _sidecar_captions(folder / name)
            yield Row(image=_image_file(folder, name), captions=captions, place=str(name))


def _images_in(folder: Path) -> Iterator[Path]:
    """Paths of the image files in a folder and those below, hidden ones left out."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in sorted(files) if not name.startswith(".")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                yield path.relative_to(folder)


def _rows_of_shards(shards: Iterable[Path]) -> Iterator[Row]:
    for shard in shards:
        for sample in tar_samples(shard):
            place = f"{sample.key} in {shard.name}"
            image = sample.image or ImageRef.of_file(shard.parent, f"{shard.name}/{sample.key}")
            yield Row(image=image, captions=(sample.caption,), place=place)


def _folder_caption(name: Path) -> tuple[str, ...]:
    return (re.sub(r"[_-]+", " ", name.parent.name),)


def _sidecar_captions(path: Path) -> tuple[str, ...]:
    text = path.with_suffix(".txt")
    return tuple(line.strip() for line in _lines(text) if line.strip()) if text.is_file() else ()


def _rows_of_list(listed: Path) -> Iterator[Row]:
    """Reads lines "image TAB caption" or "image,caption", with or without a header."""
    separator = None
    for number, line in enumerate((line.rstrip("\r\n") for line in _lines(listed) if line.strip()), start=1):
        separator = separator or ("\t" if "\t" in line else ",")
        name, _, caption = line.partition(separator)
        if number == 1 and name.strip().lower() in IMAGE_COLUMNS:
            continue
        image = _image_file(listed.parent, _CAPTION_NUMBER.sub("", name))
        yield Row(image=image, captions=(_unquoted(caption.strip()),), place=f"{listed.name} line {number}")


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
