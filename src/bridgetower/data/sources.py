"""A user's own files: rows of tables, folders of images with captions, and tar shards."""

import csv
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from bridgetower.data.images import IMAGE_SUFFIXES, MAX_TEXT, ImageRef, check_text, parquet_rows
from bridgetower.data.remote import is_url
from bridgetower.data.tars import tar_samples
from bridgetower.files import json_object

CaptionsFrom = Literal["text", "folder"]
Cells = Mapping[str, Any]

IMAGE_COLUMNS = ("image", "image_path", "path", "file", "file_name", "filename", "filepath", "img", "jpg")
CAPTION_COLUMNS = ("caption", "captions", "text", "sentence", "sentences")
SPLIT_COLUMN = "split"
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
        split: Its split, if the source has one.
        place: Where the row is, for error messages.
        problem: Of a folder that stands in the place of the images in it: why these cannot be listed.
    """

    image: ImageRef
    captions: tuple[str, ...]
    split: str | None = None
    place: str
    problem: str | None = None


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
    return _rows_of_table(source, image_column, caption_column)


def read_table(source: Path) -> Iterator[tuple[str, Cells]]:
    """Yields every row of a table: its place, for errors, and its cells by column.

    Args:
        source: A `.csv`, `.tsv`, `.jsonl` or `.parquet` file.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it is none of these, or cannot be read.
    """
    if not source.is_file():
        raise FileNotFoundError(f"no file {source}; give a table: {', '.join(_READERS)}")
    read = _READERS.get(source.suffix.lower())
    if read is None:
        raise ValueError(f"{source} is none of {', '.join(_READERS)}; convert it to one")
    return read(source)


def _rows_of_table(source: Path, image_column: str | None, caption_column: str | None) -> Iterator[Row]:
    for place, cells in read_table(source):
        image = find_column(source, cells, image_column, IMAGE_COLUMNS, "image")
        caption = find_column(source, cells, caption_column, CAPTION_COLUMNS, "caption")
        captions = cells[caption]
        yield Row(
            image=cell_image(source.parent, cells[image]),
            captions=tuple(map(cell_text, captions if isinstance(captions, list) else [captions])),
            split=split_of(source, place, cells),
            place=place,
        )


def find_column(
    source: Path, cells: Cells, asked: str | None, usual: Sequence[str], what: str, *, optional: bool = False
) -> str:
    """Returns the name of a column; an empty one if it is optional, there is none and none was named.

    Args:
        source: The table, for errors.
        cells: Of a row.
        asked: Name that the user gave; None looks for the usual ones.
        usual: In lower case.
        what: What the column holds, for errors.
        optional: Whether it may be missing.

    Raises:
        ValueError: If it is missing, or there are several.
    """
    found = [name for name in cells if (name == asked if asked else name.lower() in usual)]
    if len(found) == 1:
        return found[0]
    if optional and not found and not asked:
        return ""
    problem = f"several {what} columns ({', '.join(found)})" if found else f"no column {asked or ', '.join(usual)}"
    raise ValueError(f"{source} has {problem}, it has {', '.join(cells)}; give the name of the {what} column")


def split_of(source: Path, place: str, cells: Cells) -> str | None:
    """Returns the split in the column `split`; None if there is no such column.

    Raises:
        ValueError: If the cell names no split.
    """
    if SPLIT_COLUMN not in cells:
        return None
    name = cell_text(cells[SPLIT_COLUMN]).strip().lower()
    if name not in _SPLIT_NAMES:
        raise ValueError(f"{source}, {place}: split is {name!r}; expected one of {', '.join(_SPLIT_NAMES)}")
    return _SPLIT_NAMES[name]


def cell_text(value: object) -> str:
    """Returns the text in a cell; empty if there is none, which pandas writes as NaN."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def cell_image(root: Path, cell: object) -> ImageRef:
    """Returns the image in a cell, or the file that the cell names by a URL or from the folder `root` on."""
    if isinstance(cell, ImageRef):
        return cell
    given = cell_text(cell)
    if is_url(given):
        return ImageRef.of_url(given)
    return ImageRef.of_file(root, os.path.normpath(given) if given else "")


def _read_csv(source: Path) -> Iterator[tuple[str, Cells]]:
    delimiter = "\t" if source.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(max(MAX_TEXT, csv.field_size_limit()))  # of all readers of the process
    reader = csv.DictReader(text_lines(source), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row:
                raise ValueError(
                    f"{source}, line {reader.line_num} has more cells than the header; quote commas in captions"
                )
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{source}, after line {reader.line_num}: {error}; write it as standard CSV") from error


def _read_json_lines(source: Path) -> Iterator[tuple[str, Cells]]:
    for number, line in enumerate(text_lines(source), start=1):
        if line.strip():
            yield f"line {number}", json_object(line, f"{source}, line {number}", "write one JSON object per line")


def _read_parquet(source: Path) -> Iterator[tuple[str, Cells]]:
    for number, cells in enumerate(parquet_rows(source), start=1):
        yield f"row {number}", cells


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Cells]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
}


def _rows_of_folder(folder: Path, captions_from: CaptionsFrom) -> Iterator[Row]:
    listed, by_folder = folder / CAPTIONS_FILE, captions_from == "folder"
    if not by_folder and (shards := shards_in(folder)):
        yield from _rows_of_shards(shards)
        return
    if not by_folder and listed.is_file():
        _check_link(listed, folder)
        yield from _rows_of_list(listed)
        return
    unreadable: list[OSError] = []
    for name in files_in(folder, IMAGE_SUFFIXES, unreadable.append):
        captions = folder_caption(name.parent.name) if by_folder else _sidecar_captions(folder, name)
        yield Row(image=cell_image(folder, name), captions=captions, place=str(name))
    for error in unreadable:
        name, problem = Path(error.filename).relative_to(folder), f"the folder cannot be read ({error.strerror})"
        yield Row(image=cell_image(folder, name), captions=(), place=str(name), problem=problem)


def shards_in(folder: Path) -> list[Path]:
    """Returns the tar shards of a folder, in order.

    Raises:
        ValueError: There are images or captions beside them.
    """
    shards = sorted(path for path in folder.iterdir() if path.suffix.lower() == TAR_SUFFIX)
    if not shards:
        return []
    beside = Path(CAPTIONS_FILE) if (folder / CAPTIONS_FILE).is_file() else next(images_in(folder), None)
    if beside:
        raise ValueError(
            f"{folder} has both tar shards ({shards[0].name}) and {beside}; move the shards, or the rest, to a folder "
            "of their own"
        )
    return shards


def images_in(folder: Path) -> Iterator[Path]:
    """Paths of the image files in a folder and those below, hidden ones left out."""
    return files_in(folder, IMAGE_SUFFIXES)


def files_in(
    folder: Path, suffixes: Collection[str], onerror: Callable[[OSError], object] | None = None
) -> Iterator[Path]:
    """Paths of the files of some kinds in a folder and those below, hidden ones left out.

    Args:
        folder: That is searched.
        suffixes: Of the files.
        onerror: Gets the error of each folder that cannot be read; None: these are passed over.
    """
    for parent, folders, files in os.walk(folder, onerror=onerror):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in sorted(files) if not name.startswith(".")):
            if path.suffix.lower() in suffixes and not (path.suffix == ".ts" and is_typescript(path)):
                yield path.relative_to(folder)


def is_typescript(path: Path) -> bool:
    """Whether a `.ts` file is no video, whose packets all begin with one certain byte."""
    try:
        with path.open("rb") as file:
            return file.read(1) != b"\x47"
    except OSError:
        return False


def left_out(folder: Path, used: Collection[str]) -> Counter[str]:
    """Counts what nothing of a folder and those below is read of: files by suffix, and links to folders."""
    found: Counter[str] = Counter()
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found["links to folders"] += sum(Path(parent, name).is_symlink() for name in folders)
        for path in (Path(parent, name) for name in files if not name.startswith(".")):
            suffix = path.suffix.lower()
            if suffix not in used or (suffix == ".ts" and is_typescript(path)):
                found[suffix or "without a suffix"] += 1
    return +found


def _rows_of_shards(shards: Iterable[Path]) -> Iterator[Row]:
    for shard in shards:
        for sample in tar_samples(shard):
            place = f"{sample.key} in {shard.name}"
            image = sample.image or ImageRef.of_file(shard.parent, f"{shard.name}/{sample.key}")
            yield Row(image=image, captions=(sample.caption,), place=place)


def folder_caption(name: str) -> tuple[str, ...]:
    """Returns the caption that the name of a folder is, with spaces for what stands between words."""
    return (re.sub(r"[_-]+", " ", name),)


def _sidecar_captions(folder: Path, name: Path) -> tuple[str, ...]:
    text = (folder / name).with_suffix(".txt")
    if not text.is_file():
        return ()
    _check_link(text, folder)
    check_text(str(text), text.stat().st_size)
    return tuple(line.strip() for line in text_lines(text) if line.strip())


def _check_link(text: Path, folder: Path) -> None:
    """Makes sure that the captions in an index or a set are from its folder."""
    if text.is_symlink() and not text.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{text} is a link to a file outside of {folder}; copy the file into the folder")


def _rows_of_list(listed: Path) -> Iterator[Row]:
    """Reads lines "image TAB caption" or "image,caption", with or without a header."""
    separator = None
    for number, line in enumerate((line.rstrip("\r\n") for line in text_lines(listed) if line.strip()), start=1):
        separator = separator or ("\t" if "\t" in line else ",")
        name, _, caption = line.partition(separator)
        if number == 1 and name.strip().lower() in IMAGE_COLUMNS:
            continue
        image = cell_image(listed.parent, _CAPTION_NUMBER.sub("", name))
        yield Row(image=image, captions=(_unquoted(caption.strip()),), place=f"{listed.name} line {number}")


def _unquoted(caption: str) -> str:
    """`caption` without the quotation marks that CSV writers put around one with commas."""
    quoted = len(caption) > 1 and caption[0] == caption[-1] == '"'
    return caption[1:-1].replace('""', '"') if quoted else caption


def text_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a file with their ends.

    Raises:
        ValueError: It is not UTF-8, or a line is too long.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number in count(1):
                line = file.readline(MAX_TEXT + 1)
                if not line:
                    return
                check_text(f"{path}, line {number}", len(line))
                yield line
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
