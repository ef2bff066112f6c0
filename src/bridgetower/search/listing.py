"""The images that a source names against those of an index: what is new, what has changed, what is gone."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from bridgetower.data.images import ImageRef
from bridgetower.data.items import Columns, SourceItem, Unit, below, name_from, read_blocks
from bridgetower.data.remote import is_url
from bridgetower.extras import is_installed
from bridgetower.files import unfit_name
from bridgetower.search.table import SourceImage, place_of

_FIRST_TIME, _LAST_TIME = -62_135_596_800_000_000, 253_402_300_799_999_999  # the years 1 to 9999, in microseconds
_CACHE_KIB = 2**15  # of the database; the rest of it is in a file

# An image of which the source does not tell the size has not changed by its size.
_SAME = "old.captions = new.captions AND old.place = new.place AND old.mtime = new.mtime AND new.size IN (0, old.size)"
_WANTED = f"FROM new LEFT JOIN old USING (path) WHERE old.path IS NULL OR NOT ({_SAME})"


class Listing:
    """The images of a source and of an index, in a temporary database, so that memory does not grow with their number.

    `SQLITE_TMPDIR` names its folder.

    Attributes:
        root: Folder that the paths of the source's images start from.
        bad: What the source names and cannot be used, each with the reason, by path.
        unreachable: Paths of files, and of folders with a `/` at the end, which may be there but cannot be looked at.
        names_images: Whether the source names any image, usable or not.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bad: dict[str, str] = {}
        self.unreachable: set[str] = set()
        self.names_images = False

    def __enter__(self) -> Listing:
        self._database = sqlite3.connect("", isolation_level=None)
        columns = "path TEXT PRIMARY KEY, size INTEGER, mtime INTEGER, captions TEXT, place TEXT"
        self._database.executescript(
            f"PRAGMA journal_mode = OFF; PRAGMA cache_size = -{_CACHE_KIB};"
            f"CREATE TABLE new ({columns}, image TEXT, at TEXT); CREATE TABLE old ({columns}) WITHOUT ROWID; BEGIN;"
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def add(self, items: Iterable[SourceItem]) -> None:
        """Notes images of the source; rows about one image bring their captions together."""
        for item in items:
            self.names_images |= bool(item.problem or item.image)
            if item.problem:
                self.bad[item.id] = f"{item.id!r}: {item.problem}"
                if item.id.endswith("/"):
                    self.unreachable.add(item.id)
                continue
            if item.image is None:
                message = f"{item.place} has no image; `index` takes images, `embed` texts too"
                self.bad[message] = message
                continue
            path = item.image.name if item.image.is_file else item.id
            image = None if path in self.bad else self._described(path, item.image, item.place)
            if image is None:
                continue
            captions = json.dumps(item.texts)
            row = (path, image.size, image.mtime, captions, image.place, item.image.packed(), item.place)
            found = self._database.execute("INSERT OR IGNORE INTO new VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            if not found.rowcount:
                self._merge(path, item.image, item)

    def _merge(self, path: str, image: ImageRef, item: SourceItem) -> None:
        """Adds the captions of a row to those of an earlier row about the same image; another image is bad."""
        found = self._database.execute("SELECT captions, image, at FROM new WHERE path = ?", [path]).fetchone()
        captions, before, at = found
        if not _is_same(ImageRef.unpacked(before), image):
            message = f"{item.place}: {path!r} already names another image, that of {at}; give each a name of its own"
            self.bad[message] = message
        elif item.texts:
            both = json.dumps([*json.loads(captions), *item.texts])
            self._database.execute("UPDATE new SET captions = ? WHERE path = ?", [both, path])

    def _described(self, path: str, image: ImageRef, at: str) -> SourceImage | None:
        """Describes the file that an image is in; None if it cannot be used, or is a folder with an image's name."""
        if problem := unfit_name(path):
            self.bad[path] = f"{at}: {problem}"
            return None
        place = place_of(image, self.root)
        if image.url and not image.moment:
            return SourceImage(path=path, size=0, mtime=0, place=place)
        try:
            status = image.path.stat()
        except OSError as error:
            self.bad[path] = f"{at}: no file {path!r} ({error.strerror})"
            if not isinstance(error, FileNotFoundError | NotADirectoryError) and error.errno != errno.ELOOP:
                self.unreachable.add(path)
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        size = image.piece[1] if image.piece else 0 if image.cell else status.st_size
        mtime = 0 if image.url else min(max(status.st_mtime_ns // 1000, _FIRST_TIME), _LAST_TIME)
        return SourceImage(path=path, size=size, mtime=mtime, place=place)

    def add_indexed(self, images: Iterable[SourceImage]) -> None:
        """Notes images of the index."""
        self._database.executemany(
            "INSERT INTO old VALUES (?, ?, ?, ?, ?)",
            ((one.path, one.size, one.mtime, json.dumps(one.captions), one.place) for one in images),
        )

    def __len__(self) -> int:
        return self._count("SELECT COUNT(*) FROM new")

    def num_wanted(self) -> int:
        """Returns how many images are new or have changed."""
        return self._count(
            f"SELECT COUNT(*) FROM new LEFT JOIN old USING (path) WHERE old.path IS NULL OR NOT ({_SAME})"
        )

    def wanted(self) -> Iterator[tuple[SourceItem, SourceImage, bool]]:
        """Yields the images that are new or have changed, in the order of the source.

        Each comes with what is to be noted of it, and whether the index has an image of as many bytes.
        """
        found = self._database.execute(
            "SELECT path, new.size, new.mtime, new.captions, new.place, new.image, new.at, "
            f"new.size IN (SELECT size FROM old) {_WANTED} ORDER BY new.rowid"
        )
        for path, size, mtime, packed, place, image, at, is_of_known_size in found:
            captions = tuple(json.loads(packed))
            item = SourceItem(id=path, image=ImageRef.unpacked(image), texts=captions, place=at)
            source = SourceImage(path=path, size=size, mtime=mtime, captions=captions, place=place)
            yield item, source, bool(is_of_known_size)

    def is_indexed(self, path: str) -> bool:
        """Whether the index has an image of that path."""
        return self._database.execute("SELECT 1 FROM old WHERE path = ?", [path]).fetchone() is not None

    def removed(self) -> Iterator[str]:
        """Yields the paths of the images that the source has no more, but for those that cannot be looked at.

        Without PyAV, which reads videos, moments are kept.
        """
        kept = "" if is_installed("av") else " AND place NOT LIKE '%\"moment\"%'"
        query = f"SELECT path FROM old WHERE path NOT IN (SELECT path FROM new){kept} ORDER BY path"
        folders = tuple(path.removeprefix("./") for path in self.unreachable if path.endswith("/"))
        found = (path for (path,) in self._database.execute(query))
        return (path for path in found if path not in self.unreachable and not path.startswith(folders))

    def _count(self, query: str) -> int:
        (count,) = self._database.execute(query).fetchone()
        return int(count)


def read_sources(
    sources: Sequence[str | Path], units: Sequence[Sequence[Unit]], columns: Columns, size: int
) -> Iterator[Sequence[SourceItem]]:
    """Yields the items of sources, so many at a time; of several, they are named from their common folder on.

    Args:
        sources: The sources.
        units: Of each.
        columns: Which columns of tables are read.
        size: Items at a time.

    Raises:
        OSError, ValueError: As `bridgetower.data.items.read_blocks`, or one of several names nothing.
    """
    root = root_of_all(sources)
    for source, parts in zip(sources, units, strict=True):
        folder, is_empty = Path(), len(sources) > 1
        if len(sources) > 1:
            folder = Path(os.path.relpath(root_of(source).resolve(), root))
        for block in read_blocks(parts, columns, size, copies=False):
            is_empty = is_empty and not block.items
            yield [_item_below(folder, item) for item in block.items]
        if is_empty:
            raise ValueError(f"{source} names no image; nothing was changed: leave it out if that is right")


def _item_below(folder: Path, item: SourceItem) -> SourceItem:
    return replace(item, id=name_from(folder, item.id), image=item.image and below(folder, item.image))


def _is_same(image: ImageRef, other: ImageRef) -> bool:
    """Whether two rows have the same image; contents are compared, but not fetched."""
    if image == other:
        return True
    try:
        return not (image.url or other.url) and image.read() == other.read()
    except (OSError, ValueError):
        return False


def root_of_all(sources: Sequence[str | Path]) -> str | Path:
    """Returns the folder that the paths of sources start from, or the URL of the only one.

    Raises:
        ValueError: There is none, one is in another, or there are several of which one is a URL.
    """
    if not sources:
        raise ValueError("nothing to index; name a folder of images, a table, tar shards or videos")
    if len(sources) == 1:
        return str(sources[0]) if is_url(sources[0]) else root_of(sources[0])
    if urls := [str(source) for source in sources if is_url(source)]:
        raise ValueError(f"{urls[0]} is a URL, of which an index can only have one source; make an index of its own")
    places = [Path(source).resolve() for source in sources]
    for number, place in enumerate(places):
        if inside := [one for one in places[:number] + places[number + 1 :] if one.is_relative_to(place)]:
            raise ValueError(f"{inside[0]} is given twice, as it is in {place}; leave it out")
    return Path(os.path.commonpath([root_of(place) for place in places]))


def root_of(source: str | os.PathLike[str]) -> Path:
    """Returns the folder that the paths of a local source start from."""
    path = Path(source)
    return path if path.is_dir() else path.parent
