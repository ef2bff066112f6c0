"""Shards of sets at URLs: their copies in a cache, and rows whose images are read from these copies."""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import Lock, Semaphore, Thread
from typing import TYPE_CHECKING, Any

from bridgetower.data.parquet import ParquetRows, read_schema
from bridgetower.data.remote import fetch
from bridgetower.disk_cache import DiskCache
from bridgetower.files import read_json, sha256_of

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

PLACE_FILE = "place.json"
"""In a folder of texts: where the set is, and where copies of its shards are kept."""

START, LENGTH = "start", "length"
"""Columns of the texts of a tar shard: where an image is in it, in bytes."""

_MARK = b"shard"  # metadata of a file of texts
_FETCHED_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file with images, at a URL.

    Attributes:
        url: Of the file.
        version: Changes when the file does.
        digest: SHA-256 of its content.
        size: In bytes.
        bad: What of it cannot be used.
    """

    url: str
    version: str
    digest: str = ""
    size: int = 0
    bad: tuple[str, ...] = ()

    @property
    def is_tar(self) -> bool:
        """Whether it is a tar archive; else it is a Parquet file."""
        return self.url.lower().endswith(".tar")

    def marked(self, schema: pa.Schema) -> pa.Schema:
        """Returns the schema of its texts with what `of_texts` reads."""
        return schema.with_metadata({**(schema.metadata or {}), _MARK: json.dumps(asdict(self)).encode()})

    @classmethod
    def of_texts(cls, path: Path) -> Shard | None:
        """Returns the shard of a file of texts; None where a shard was left out."""
        mark = (read_schema(path).metadata or {}).get(_MARK)
        if mark is None:
            return None
        values = json.loads(mark)
        return cls(**{**values, "bad": tuple(values["bad"])})


class ShardCache(DiskCache):
    """Copies of shards, and the texts of each shard in a file of its own."""

    def __init__(self, folder: Path, limit: int) -> None:
        super().__init__(folder, limit, "copies of shards")

    @contextmanager
    def copy(self, shard: Shard) -> Iterator[Path]:
        """Gives a copy of a shard, which is fetched if it is not there; opened or mapped, it stays valid.

        Raises:
            OSError: The shard cannot be read, or the disk has no room for it.
            ValueError: Its content is not that of its digest.
        """
        content = {"copy of": shard.url, "version": shard.version}
        with self.file(content, shard.size, partial(_fetch, shard)) as path:
            yield path

    @contextmanager
    def texts(self, shard: Shard, make: Callable[[Path], None]) -> Iterator[Path]:
        """Gives the texts of a shard, which are made if they are not there."""
        with self.file({"texts of": shard.url, "version": shard.version}, 0, make) as path:
            yield path


def _fetch(shard: Shard, path: Path) -> None:
    logger.info("copying %s to the cache", shard.url)
    fetch(shard.url, path)
    found = sha256_of(path)
    if shard.digest not in ("", found):
        raise ValueError(
            f"{shard.url} has SHA-256 {found[:16]}…, expected {shard.digest[:16]}…: it is damaged, or was written "
            "anew; copy it there again"
        )


class RemoteRows(ParquetRows):
    """Rows of files of texts, with images from shards, each of which is copied when an image of it is first asked for.

    Attributes:
        shards: Of each file; None where one was left out.
    """

    def __init__(self, paths: Sequence[Path], cache: ShardCache, num_open: int, *, keep: float = 0) -> None:
        """Opens the files of texts.

        Args:
            paths: Of the files.
            cache: Of shards.
            num_open: Shards that stay open, the last ones read.
            keep: Row groups of texts that stay in memory.
        """
        super().__init__(paths, keep=keep)
        self.shards = [Shard.of_texts(path) for path in paths]
        self._cache, self._num_open, self._opening = cache, num_open, Lock()
        self._images = image_columns(self.schema)
        self._copies: OrderedDict[int, ParquetRows | _TarCopy] = OrderedDict()

    def __reduce__(self) -> Any:
        return partial(RemoteRows, keep=self._keep), (self.paths, self._cache, self._num_open)

    def row(self, number: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """Returns a row, counted from 0 over all files: the named columns, or all of them.

        Raises:
            IndexError: There is no such row.
            OSError: The shard cannot be read, or the disk has no room for it.
            ValueError: The content of the shard is not that of its digest.
        """
        row = super().row(number, columns)
        images = [name for name in row if name in self._images]
        if images:
            file, place = self.place(number)
            row |= self._copy(file).row(place, images)
        return row

    def fetch(self, file: int) -> None:
        """Copies the shard of a file to the cache, if it is not there."""
        shard = self.shards[file]
        if shard is not None:
            with self._cache.copy(shard):
                pass

    def _copy(self, file: int) -> ParquetRows | _TarCopy:
        with self._opening:
            if file not in self._copies:
                shard = self.shards[file]
                assert shard is not None  # a file without shard has no rows
                with self._cache.copy(shard) as path:
                    self._copies[file] = _TarCopy(path, self.paths[file]) if shard.is_tar else ParquetRows([path])
                if len(self._copies) > self._num_open:
                    self._copies.popitem(last=False)
            self._copies.move_to_end(file)
            return self._copies[file]


class _TarCopy:
    """The images of a tar shard."""

    def __init__(self, path: Path, texts: Path) -> None:
        import pyarrow.parquet as pq

        self._file = path.open("rb")
        table = pq.read_table(texts, columns=["image_id", START, LENGTH])
        self._names, self._starts, self._lengths = (column.to_pylist() for column in table.columns)

    def row(self, number: int, columns: Sequence[str]) -> dict[str, Any]:
        content = os.pread(self._file.fileno(), self._lengths[number], self._starts[number])
        return {column: {"bytes": content, "path": self._names[number]} for column in columns}


def image_columns(schema: pa.Schema) -> list[str]:
    """Returns the columns of images: those with bytes and path."""
    import pyarrow as pa

    structs = [field for field in schema if pa.types.is_struct(field.type)]
    return [field.name for field in structs if {child.name for child in field.type} == {"bytes", "path"}]


def open_rows(paths: Sequence[Path], *, keep: float = 0) -> ParquetRows:
    """Opens Parquet files of a prepared set, or of the texts of one whose images are at a URL.

    Args:
        paths: Of the files, in one folder.
        keep: Row groups that stay in memory, the last ones read; infinity keeps all.
    """
    place = place_of(paths[0].parent)
    if place is None:
        return ParquetRows(paths, keep=keep)
    cache = ShardCache(Path(place["cache"]), place["limit"])
    return RemoteRows(paths, cache, place["num_open"], keep=keep)


def place_of(folder: Path) -> Mapping[str, Any] | None:
    """Returns where the set of a folder of texts is; None for other folders."""
    path = Path(folder) / PLACE_FILE
    return read_json(path) if path.is_file() else None


def shown_place(folder: Path) -> str:
    """Returns the path of a prepared set, or its URL if the folder has only its texts."""
    place = place_of(folder)
    return str(folder) if place is None else str(place["url"])


class FetchAhead:
    """Fetches shards in threads before they are needed; an error is left to whoever needs the shard."""

    def __init__(self, fetch: Callable[[int], None]) -> None:
        self._fetch, self._slots = fetch, Semaphore(_FETCHED_AT_ONCE)

    def __call__(self, shards: Sequence[int]) -> None:
        """Fetches some shards, the first ones first."""
        for shard in shards:
            Thread(target=self._run, args=(shard,), daemon=True).start()

    def _run(self, shard: int) -> None:
        with self._slots:
            try:
                self._fetch(shard)
            except (OSError, ValueError) as error:
                logger.warning("%s", error)
