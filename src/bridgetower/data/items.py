"""Images and texts of any source, one after the other, for embedding: folders, tables, tar shards, videos."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from bridgetower.data.cells import COLUMNAR, rows_of
from bridgetower.data.images import IMAGE_SUFFIXES, ImageRef
from bridgetower.data.moments import (
    SUBTITLE_SUFFIXES,
    VIDEO_SUFFIXES,
    Cutting,
    images_of_video,
    readable_videos,
    subtitles_of,
)
from bridgetower.data.remote import expanded, file_name, files_below, is_url, local_copy, name_below
from bridgetower.data.remote_videos import copy_of
from bridgetower.data.sources import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    TAR_SUFFIX,
    CaptionsFrom,
    Cells,
    cell_image,
    cell_text,
    files_in,
    find_column,
    folder_caption,
    images_in,
    left_out,
    read_rows,
    shards_in,
    text_lines,
)

URL_COLUMNS = ("url", "image_url")
ID_COLUMNS = ("id", "image_id", "key", "uid")
TEXTS_SUFFIX = ".txt"

_JSON_LINES = (".jsonl", ".ndjson")
_TABLES = (".csv", ".tsv", *_JSON_LINES, *COLUMNAR)
_DESCRIPTIONS = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of a folder of images, as `datasets` has it

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of tables are read; None looks for the usual names.

    Attributes:
        image: Paths, URLs or image bytes.
        text: A text or a list of texts.
        id: What names a row.
        captions_from: "folder" takes the name of the folder that an image is in as its caption.
        cutting: How videos become moments.
    """

    image: str | None = None
    text: str | None = None
    id: str | None = None
    captions_from: CaptionsFrom = "text"
    cutting: Cutting = field(default_factory=Cutting)


@dataclass(frozen=True, kw_only=True)
class SourceItem:
    """An image with its texts, or texts alone.

    Attributes:
        id: From the table, or the image's name, or the number of the row; of a folder that cannot be read it ends in /.
        image: Where the image is; None: there is none.
        texts: As given, stripped, none empty.
        place: Where the row is, for errors.
        problem: Why it cannot be used, where listing it has shown that.
    """

    id: str
    image: ImageRef | None
    texts: tuple[str, ...] = ()
    place: str
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A part of a source that is read on its own: a file, or a folder of images.

    Attributes:
        place: Path or URL.
        items: What it has; None: the place is read.
        name: Of a video, or of a file of a source that may have several: from the folder of the source on.
    """

    place: str
    items: tuple[SourceItem, ...] | None = field(default=None, repr=False)
    name: str = ""

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, to which images may come."""
        return self.items is not None or Path(self.place).is_dir()

    @property
    def is_video(self) -> bool:
        """Whether it is a video."""
        return bool(self.name) and _ending(self.place) in VIDEO_SUFFIXES

    @property
    def signature(self) -> str:
        """What changes when a local file does."""
        if is_url(self.place) or self.is_folder:
            return self.place
        beside = subtitles_of(Path(self.place)) if self.is_video else None
        statuses = [path.stat() for path in (Path(self.place), beside) if path]
        return " ".join([self.place, *(f"{status.st_size} {status.st_mtime_ns}" for status in statuses)])


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some items of a unit, which are embedded and written together.

    Attributes:
        unit: Number of the unit.
        number: Of the block in its unit.
        items: At most as many as a block has.
        last: Whether the unit has no more.
        copied: File that the items are read from and that is removed after the last block; None: none.
    """

    unit: int
    number: int
    items: tuple[SourceItem, ...] = field(repr=False)
    last: bool
    copied: ExitStack | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """Sorts blocks in the order of the source."""
        return f"{self.unit:06}-{self.number:06}"

    @property
    def has_files(self) -> bool:
        """Whether images are files of their own, which change without a change of the unit's signature."""
        return any(item.image is not None and item.image.is_file for item in self.items)

    def digest(self) -> str:
        """Returns a digest of the items, of image files as they are now, and of whether more blocks follow.

        Of an item its name, place and texts count, and of an image in a file of its own the size and time of the file.
        """
        content = [self.last, *((item.id, item.place, item.texts, _status(item.image)) for item in self.items)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def release(self) -> None:
        """Removes the copy of the unit's file after its last block."""
        if self.copied is not None:
            self.copied.close()


def _status(image: ImageRef | None) -> tuple[int, int] | None:
    """Size and time of writing of an image file; None if it is no file of its own, or cannot be found."""
    if image is None or not image.is_file:
        return None
    try:
        status = image.path.stat()
    except (OSError, ValueError):  # decoding says what is wrong
        return None
    return status.st_size, status.st_mtime_ns


def units_of(source: str | Path) -> list[Unit]:
    """Returns the parts of a source, in order.

    Args:
        source: A folder of images (perhaps with a text file of the same name beside each), a table (CSV, TSV, JSON
            lines, Parquet, Arrow), a tar shard, a video, a `.txt` file with a text per line, a folder of shards or of
            Parquet or Arrow files, such as `datasets` writes; or the URL of one, perhaps with `*`.

    Raises:
        FileNotFoundError: There is no such source.
        ValueError: It is none of these.
    """
    if is_url(source):
        return [unit for url in expanded(str(source)) for unit in _units_at(url, str(source))]
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no file or folder {path}; give a folder of images, a table, a tar shard, or a video")
    if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
        return [Unit(place=str(path), name=path.name)]
    if not path.is_dir():
        _check_kind(str(path))
        return [Unit(place=str(path))]
    described = [path / name for name in _DESCRIPTIONS if (path / name).is_file()]
    found = shards_in(path) or described[:1]
    videos = [Unit(place=str(path / name), name=str(name)) for name in readable_videos(path)]
    unreadable: list[OSError] = []
    if not found and next(files_in(path, IMAGE_SUFFIXES, unreadable.append), None) is None and not unreadable:
        found = _tables_in(path)
        if videos and not found:
            return videos
    files = [Unit(place=str(file), name=str(file.relative_to(path))) for file in found]
    return [*(files or [Unit(place=str(path))]), *videos]


def left_out_of(units: Sequence[Unit]) -> dict[str, int]:
    """Counts the files of which nothing is read in the folders of a source, by suffix, and logs it."""
    used = {*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, *SUBTITLE_SUFFIXES, TEXTS_SUFFIX}
    folders = {Path(unit.place) for unit in units if unit.items is None and unit.is_folder}
    found = sum((left_out(folder, used) for folder in folders), Counter[str]())
    if found:
        logger.info("nothing is read of: %s", ", ".join(f"{count} {name}" for name, count in found.most_common()))
    return dict(found.most_common())


def given_units(images: Sequence[Path], texts: Sequence[str], *, pairs: bool) -> list[Unit]:
    """Returns images and texts that are given one by one as a source.

    Args:
        images: Files, or folders of them; their paths name them.
        texts: Texts, which have no names.
        pairs: Whether text n belongs to image n.

    Raises:
        ValueError: There are not as many texts as images, which pairs need.
    """
    if pairs and len(images) != len(texts):
        raise ValueError(f"{len(images)} images and {len(texts)} texts; expected one text per image")
    files = images if pairs else [file for given in images for file in _files_of(given)]
    shown = [SourceItem(id=str(file), image=ImageRef.of_file(Path(), str(file)), place=str(file)) for file in files]
    words = [SourceItem(id="", image=None, texts=(text,), place=repr(text)) for text in texts]
    if pairs:
        shown = [replace(image, texts=word.texts) for image, word in zip(shown, words, strict=True)]
    return [Unit(place="the input", items=tuple(shown if pairs else [*shown, *words]))]


def _files_of(given: Path) -> list[Path]:
    return [given / name for name in images_in(given)] if given.is_dir() else [given]


def _tables_in(folder: Path) -> list[Path]:
    """Returns the Parquet or Arrow files of a folder and of those in it, hidden ones left out."""
    return sorted(folder / name for name in files_in(folder, COLUMNAR))


def _ending(place: str) -> str:
    return Path(file_name(place) if is_url(place) else place).suffix.lower()


def _units_at(url: str, source: str) -> list[Unit]:
    if _ending(url) in VIDEO_SUFFIXES:
        return [Unit(place=url, name=url)]
    if _ending(url) in (TAR_SUFFIX, TEXTS_SUFFIX, *_TABLES):
        return [Unit(place=url, name="" if url == source else name_below(url, source))]
    if url.lower().startswith("http"):
        raise ValueError(f"{url} is no table, tar shard or video; the files of a folder cannot be listed over HTTP")
    files = files_below(url)
    shards, tables = ([file for file in files if file.lower().endswith(ends)] for ends in (TAR_SUFFIX, COLUMNAR))
    described = [file for file in files if file_name(file) in _DESCRIPTIONS]
    images = [file for file in files if _ending(file) in IMAGE_SUFFIXES]
    found = shards or described[:1] or ([] if images else tables)
    items = tuple(SourceItem(id=image, image=ImageRef.of_url(image), place=image) for image in images)
    videos = [Unit(place=file, name=file) for file in files if _ending(file) in VIDEO_SUFFIXES]
    shown = [] if found or (videos and not items) else [Unit(place=url, items=items)]
    return [*(Unit(place=file, name=name_below(file, source)) for file in found), *shown, *videos]


def _check_kind(name: str) -> None:
    if Path(name).suffix.lower() not in (TAR_SUFFIX, TEXTS_SUFFIX, *_TABLES):
        kinds = ", ".join((TAR_SUFFIX, TEXTS_SUFFIX, *_TABLES, *sorted(VIDEO_SUFFIXES)))
        raise ValueError(f"{name} is no source; expected a folder, or a file that ends in {kinds}")


def read_blocks(
    units: Sequence[Unit],
    columns: Columns,
    size: int,
    *,
    skip: Callable[[int], bool] = lambda unit: False,
    copies: bool = True,
) -> Iterator[Block]:
    """Reads what a source names, in blocks; images are not read.

    Args:
        units: Parts of the source.
        columns: Which columns of tables are read.
        size: Items of a block; the last of a unit may have fewer.
        skip: Says of the number of a unit that it is not needed.
        copies: Read images of a shard at a URL from the copy that was made to list it, until `Block.release` is called;
            otherwise from the URL, piece by piece, which other machines can do too.

    Raises:
        OSError: Something cannot be read.
        ValueError: As `bridgetower.data.sources.read_rows`, or a column is missing.
    """
    for number, unit in enumerate(units):
        if skip(number):
            continue
        with ExitStack() as stack:
            items = _items_of(unit, columns, stack, copies=copies)
            block, index = tuple(islice(items, size)), 0
            while True:
                following = tuple(islice(items, size))
                copied = stack.pop_all() if not following and copies else None
                yield Block(unit=number, number=index, items=block, last=not following, copied=copied)
                if not following:
                    break
                block, index = following, index + 1


def _items_of(unit: Unit, columns: Columns, stack: ExitStack, *, copies: bool) -> Iterator[SourceItem]:
    if unit.items is not None:
        by_folder = columns.captions_from == "folder"
        return (replace(item, texts=_url_caption(item.id)) if by_folder else item for item in unit.items)
    if unit.is_video:
        return _items_of_video(unit, columns.cutting)
    if not is_url(unit.place):
        return read_items(Path(unit.place), columns, unit.name)
    path = stack.enter_context(local_copy(unit.place))
    return map(_Elsewhere(unit.place, path.parent, copies), read_items(path, columns, unit.name))


def _url_caption(url: str) -> tuple[str, ...]:
    return folder_caption(Path(url.rpartition("/")[0]).name)


@dataclass(frozen=True)
class _Elsewhere:
    """Tells where the items of a copied file really are.

    Attributes:
        url: That was copied.
        folder: Of the copy.
        copies: Whether images inside the file are read from the copy.
    """

    url: str
    folder: Path
    copies: bool

    def __call__(self, item: SourceItem) -> SourceItem:
        image = item.image
        if image is None or image.url:
            return item
        if image.is_file:  # beside the table
            beside = os.path.relpath(image.path, self.folder)
            return replace(item, image=ImageRef.of_url(self.url.rpartition("/")[0] + "/" + beside))
        if self.copies:
            return item
        if image.cell:
            raise ValueError(f"{self.url} holds images in a table; workers read these only from a disk: copy it to one")
        return replace(item, image=replace(image, url=self.url))


def _items_of_video(unit: Unit, cutting: Cutting) -> Iterator[SourceItem]:
    url = unit.place if is_url(unit.place) else None
    try:
        path = copy_of(url) if url else Path(unit.place)
    except (OSError, ValueError) as error:
        yield SourceItem(id=unit.name, image=None, place=unit.name, problem=str(error))
        return
    images, problem = images_of_video(path, unit.name, cutting)
    for image, text in images:
        yield SourceItem(id=image.name, image=replace(image, url=url), texts=_stripped((text,)), place=image.name)
    if problem:
        yield SourceItem(id=unit.name, image=None, place=unit.name, problem=problem)


def below(folder: Path, image: ImageRef) -> ImageRef:
    """Returns an image whose name starts from a folder further up; URLs and absolute paths stay."""
    return replace(image, name=name_from(folder, image.name))


def name_from(folder: Path, name: str) -> str:
    """Returns a name in a folder from another one on, which that folder is in; URLs and absolute paths stay."""
    if folder == Path() or is_url(name):
        return name
    return os.path.normpath(folder / name) + ("/" if name.endswith("/") else "")


def read_items(source: Path, columns: Columns, name: str = "") -> Iterator[SourceItem]:
    """Reads what a local file, or a folder of images, names.

    Args:
        source: The file or folder.
        columns: Which columns of tables are read.
        name: Of a file of several: from the folder of the source on. Names of images start from that folder then,
            and rows without a name are named after file and row.

    Raises:
        OSError, ValueError: As `read_blocks`.
    """
    suffix, folder = source.suffix.lower(), Path(name).parent
    if source.is_dir() or suffix == TAR_SUFFIX:
        names = {"image_column": columns.image, "caption_column": columns.text}
        for row in read_rows(source, **names, captions_from=columns.captions_from):
            image, folders = below(folder, row.image), "" if row.problem is None else "/"
            texts = _stripped(row.captions)
            yield SourceItem(id=image.name + folders, image=image, texts=texts, place=row.place, problem=row.problem)
    elif suffix == TEXTS_SUFFIX:
        for number, line in enumerate(text_lines(source), start=1):
            if line.strip():
                place = f"{name or source.name} line {number}"
                yield SourceItem(id=_row_name(name, number), image=None, texts=(line.strip(),), place=place)
    else:
        yield from _items_of_table(source, columns, name)


def _row_name(table: str, number: int) -> str:
    return f"{table}/{number}" if table else str(number)


def _items_of_table(source: Path, columns: Columns, name: str) -> Iterator[SourceItem]:
    for number, (place, cells, (image, text, key)) in enumerate(_named_rows(source, columns), start=1):
        cell = cells.get(image) if image else None
        found = below(Path(name).parent, cell_image(source.parent, cell)) if cell else None
        texts = cells.get(text) if text else None
        if columns.captions_from == "folder" and found is not None:
            texts = list(folder_caption(Path(found.name).parent.name))
        given = cell_text(cells.get(key)) if key else ""
        yield SourceItem(
            id=given or (_row_name(name, number) if found is None else found.name),
            image=found,
            texts=_stripped(map(cell_text, texts if isinstance(texts, list) else [texts])),
            place=f"{name or source.name} {place}",
        )


def _named_rows(source: Path, columns: Columns) -> Iterator[tuple[str, Cells, tuple[str, str, str]]]:
    """Yields the rows of a table, each with the names of its columns of images, texts and ids.

    Any row of JSON lines may lack any column, even one that the user names, but not all of them may.

    Raises:
        ValueError: A column is missing, or there are several of a kind.
    """
    held, rows = rows_of(source)
    asked = {name for name in (columns.image, columns.text, columns.id) if name}
    is_sparse = source.suffix.lower() in _JSON_LINES
    blank = dict.fromkeys(asked) if is_sparse else {}
    given: tuple[str, ...] | None = None
    names, usable = ("", "", ""), False
    for place, cells in rows:
        if tuple(cells) != given:
            given = tuple(cells)
            asked.difference_update(given)
            names = _names_of(source, {**blank, **cells}, held, columns)
            usable = usable or any(names[:2])
        if not usable and not is_sparse:
            break
        yield place, cells, names
    if given is not None and not usable:
        raise ValueError(f"{source} has no column of images and none of texts; it has {', '.join(given)}: name one")
    if given is not None and asked:
        raise ValueError(
            f"no row of {source} has a column {', '.join(sorted(asked))}; give the name of one that it has"
        )


def _names_of(source: Path, cells: Cells, held: Sequence[str], columns: Columns) -> tuple[str, str, str]:
    """Returns the columns of images, texts and ids; empty where there is none."""
    asked = columns.image or (held[0] if len(held) == 1 else None)
    image = find_column(source, cells, asked, IMAGE_COLUMNS, "image", optional=True) or find_column(
        source, cells, None, URL_COLUMNS, "image", optional=True
    )
    text = find_column(source, cells, columns.text, CAPTION_COLUMNS, "caption", optional=True)
    key = find_column(source, cells, columns.id, ID_COLUMNS, "id", optional=True)
    return image, text, key


def _stripped(texts: Collection[str] | Iterator[str]) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, texts)))
