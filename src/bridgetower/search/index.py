"""An index of images: a Lance table with a row per image, what a row says, and the bytes of what was indexed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from jaxtyping import Float
from lancedb.index import FTS, BTree, IvfSq
from lancedb.query import MatchQuery
from torch import Tensor

from bridgetower.checkpoints import is_downloaded
from bridgetower.data.sets.store import CRC, Table, Uri, message_of, split_uri
from bridgetower.data.sources.example import Image
from bridgetower.data.sources.fetch import BRIEF, is_url, open_regular
from bridgetower.files import json_object, parse_json
from bridgetower.plain import from_plain
from bridgetower.processor import check_length
from bridgetower.search.checksums import CRCS, ROW_CRC, columns_to_check, damaged_rows, with_crcs
from bridgetower.search.config import Against, Vectors
from bridgetower.search.memory import Memory

ABOUT = ("path", "size", "mtime", "width", "height", "captions", "start", "end")
"""Columns of a result, and of conditions."""

RETURNED = ("digest", "path", "size", "width", "height", "captions", "location", "start", "end")
"""Columns of an `Indexed`."""

COLUMNS: dict[Vectors, str] = {
    "images": "image_vector",
    "captions": "text_vectors",
    "pairs": "pair_vectors",
}
"""Columns of vectors."""

# of moments in which something is said
_SPOKEN = "start IS NOT NULL AND array_length(captions) > 0"
_SILENT = f"({_SPOKEN}) IS NOT TRUE"  # of all others
_NULLABLE = ("start", "end", "frame")  # of images that are no moments
_MARK = b"bridgetower"  # key of the schema's metadata
_UNRELATED = "bridgetower.unrelated"  # key of the metadata of the column of images' vectors
_VERSION = 7
_CHANGED = "the {} has changed since it was indexed; bring the index up to date"
_BESIDE = "./"  # begins paths that are relative to the folder that the index is in
_SEEN_WITHIN = 1.0  # seconds after which a reader notices what another process wrote
_KEPT = timedelta(hours=1)  # for readers of an older version
_MAX_FRAGMENTS = 20
_LOOKED_UP, _LOOKED_UP_FROM = (
    ("digest", "path"),
    10_000,
)  # columns that get an index, and rows from which on
_PROBED_SHARE = 0.2  # of the partitions; benchmarks/search.py measures its cost and recall
_SAMPLED, _ITERATIONS = 64, 10  # vectors of a partition and rounds by which partitions are found
_REFINED = 4  # times as many are ranked again by their full vectors
_MAX_PATHS = 1000  # in one condition
_MAX_COPIES = 8  # of one file that are returned
_FEWEST, _MOST = (
    10_000,
    2**32,
)  # rows from which on, and bytes up to which, all vectors are compared in memory


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """What an index is of."""

    fingerprint: str  # of the model that made the vectors
    model: (
        str  # where that model was loaded from; a path within the index's folder is relative to it
    )
    root: str  # folder that the images' paths start from, likewise
    image_width: int  # of the vectors of images and texts
    pair_width: int  # of those of pairs

    def schema(self) -> pa.Schema:
        """Returns the columns of an index, with this as metadata."""
        image, pair = (
            pa.list_(pa.float32(), width) for width in (self.image_width, self.pair_width)
        )
        fields = {
            "path": pa.string(),
            "size": pa.int64(),
            "mtime": pa.timestamp("us", tz="UTC"),
            "version": pa.string(),  # of the file that it is in
            "part_size": pa.int32(),  # of the last image of a file with several: how many these are; else 0
            "digest": pa.string(),
            "width": pa.int32(),
            "height": pa.int32(),
            "captions": pa.list_(pa.field("item", pa.string(), nullable=False)),
            "location": pa.string(),
            "start": pa.float64(),
            "end": pa.float64(),
            "frame": pa.large_binary(),
            "image_vector": image,
            "text_vectors": pa.list_(image),
            "pair_vectors": pa.list_(pair),
            ROW_CRC: pa.uint32(),
            CRCS["text_vectors"]: pa.uint32(),
            CRCS["pair_vectors"]: pa.uint32(),
        }
        return pa.schema(
            [pa.field(name, kind, nullable=name in _NULLABLE) for name, kind in fields.items()],
            metadata={_MARK: json.dumps({"version": _VERSION, **asdict(self)}).encode()},
        )

    @classmethod
    def of(cls, uri: Uri, schema: pa.Schema) -> IndexInfo:
        """Reads it from a table, and checks that this has the columns of an index and no others."""
        content = parse_json((schema.metadata or {}).get(_MARK, b"{}"), f"what {uri} is of")
        if not isinstance(content, dict) or content.pop("version", None) != _VERSION:
            raise ValueError(
                f"{uri} is no index of this release; choose another name, or make it again"
            )
        info = from_plain(cls, content, f"what {uri} is of")
        if not schema.equals(info.schema().append(pa.field(CRC, pa.uint32()))):
            raise ValueError(
                f"{uri} has other columns than an index; choose another name, or make it again"
            )
        return info


@dataclass(frozen=True, kw_only=True)
class Unrelated:
    """The cosines that one in twenty unrelated texts reaches with its nearest vector; None where there are none."""

    rows: int  # of the index when this was computed
    images: float | None = None
    captions: float | None = None
    pairs: float | None = None


@dataclass(frozen=True, kw_only=True)
class Indexed:
    """An image as the index has it."""

    digest: str  # SHA-256 of the file
    path: str  # from the folder of the images
    size: int  # of the file, in bytes
    width: int  # of the upright image, in pixels
    height: int
    captions: Sequence[str]  # that came with it
    location: str = ""  # where in a shard, a table or a video, or at which URL, as JSON; empty for an image file
    # seconds from the start of the video, of a moment; None for an image
    start: float | None = None
    end: float | None = None

    def where(self) -> dict[str, Any]:
        """Returns its place; the index may be from someone else, so the types are checked."""
        where = json_object(self.location or "{}", "the location of an image")
        piece, cell = where.get("piece", [0, 1]), where.get("cell", ["", 0])

        def are(values: Any, *kinds: type) -> bool:
            return isinstance(values, list) and [type(value) for value in values] == list(kinds)

        if not (
            all(isinstance(where.get(name, ""), str) for name in ("file", "url"))
            and (are(piece, int, int) and piece[0] >= 0 and piece[1] > 0)
            and (are(cell, str, int) and cell[1] >= 0)
        ):
            raise ValueError(
                f"the index has {self.location} as the location of {self.path!r}; make the index again"
            )
        return where

    def file_in(self, root: Path) -> Path | str:
        """Returns its file, the shard, table or video that it is in, or its URL."""
        where = self.where()
        return str(where["url"]) if "url" in where else root / where.get("file", self.path)


@dataclass(frozen=True, kw_only=True)
class Hit(Indexed):
    """An image that was found."""

    file: Path | str  # the image, or the shard, table or video that it is in, or its URL
    against: Against  # what the query was compared with
    cosine: float  # of the vectors of both
    rank_score: float  # of the second stage where they were matched, else the cosine
    # no nearer than unrelated texts come; None: that is not known, or not asked by text alone
    weak: bool | None = None
    # that text and image match, where they were matched and there is a calibration
    probability: float | None = None
    # of the matching head, from 0 to 1, where they were matched and there is none
    score: float | None = None


class _Version:
    """What was asked of one version of a table: each is asked once."""

    def __init__(self, table: Any) -> None:
        self.table, self.number = table, table.version
        self.memory: Memory | None = None
        self.searched, self.loading = (
            False,
            Lock(),
        )  # all of it was, by exact vectors; one thread loads the memory
        self.checked = set[Vectors]()  # of which kinds all vectors were compared with their CRCs

    @cached_property
    def rows(self) -> int:
        return int(self.table.count_rows())

    @cached_property
    def spoken(self) -> int:
        return int(self.table.count_rows(_SPOKEN))

    @cached_property
    def unrelated(self) -> Unrelated | None:
        metadata = self.table.schema.field("image_vector").metadata or {}
        if _UNRELATED.encode() not in metadata:
            return None
        what = "what the index notes of unrelated texts"
        return from_plain(
            Unrelated, json_object(metadata[_UNRELATED.encode()].decode(), what), what
        )

    @cached_property
    def grouped(self) -> bool:
        return any(index.columns == ["image_vector"] for index in self.table.list_indices())


class Index:
    """Images and their vectors.

    The folder is a Lance table, which other tools read too. Every change is one atomic commit: a process that is killed
    leaves the table as it was before or after.

    Attributes:
        uri: Of the folder, whose name ends in `.lance`; an object store's (`s3://…`, `gs://…`, `az://…`) will do.
        info: What it is of.
    """

    def __init__(self, uri: Uri, *, root: Path | None = None) -> None:
        """Opens an index.

        Args:
            uri: Of the folder; settings of an object store are those of its usual environment variables.
            root: Folder of the images, if they are elsewhere now.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is something else.
        """
        self.uri, self._root = str(uri), root
        split_uri(self.uri)  # refuses a folder that is no table
        self._opened: tuple[Any, tuple[int, int] | None] | None = None
        self._seen = 0.0
        self.info = IndexInfo.of(uri, self._table.schema)
        self._known = _Version(self._table)

    @classmethod
    def create(cls, uri: Uri, info: IndexInfo) -> Index:
        """Makes an empty index with a full-text index of captions; paths of `info` may be absolute."""
        model = portable(uri, info.model) if Path(info.model).exists() else info.model
        info = replace(info, model=model, root=portable(uri, info.root))
        with _told(str(uri), "written"):
            table = Table.create(uri, info.schema(), checked="image_vector")
            table.lance.create_index("captions", config=FTS())
        return cls(uri)

    @property
    def _table(self) -> Any:
        """The newest version; opened again where another table, with versions of the same numbers, took its place."""
        folder = None
        if not is_url(self.uri) and Path(self.uri).is_dir():
            status = Path(self.uri).stat()
            folder = status.st_ino, status.st_ctime_ns
        with _told(self.uri):
            if self._opened is None or self._opened[1] != folder:
                try:
                    self._opened = Table(self.uri).lance, folder
                except FileNotFoundError as error:
                    raise FileNotFoundError(
                        f"no index at {self.uri}; make one with bridgetower index PHOTOS --out {self.uri}"
                    ) from error
            elif time.monotonic() - self._seen > _SEEN_WITHIN:
                self._opened[0].checkout_latest()
        self._seen = time.monotonic()
        return self._opened[0]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Takes back a commit whose files a full disk has cut off: readers keep what was there before."""
        try:
            with _told(self.uri, "written"):
                yield
            Table(self.uri).check_end()
        except OSError:
            with suppress(OSError):
                Table(self.uri).recover()
            self._opened = None
            raise

    def __len__(self) -> int:
        with _told(self.uri):
            return int(self._table.count_rows())

    @cached_property
    def root(self) -> Path:
        """Folder that the images' paths start from."""
        return self._root or Path(resolved(self.uri, self.info.root))

    @property
    def num_spoken(self) -> int:
        """How many entries are moments in which something is said."""
        with _told(self.uri):
            return self._version.spoken

    @property
    def unrelated(self) -> Unrelated | None:
        """What unrelated texts reach; None where no run of `bridgetower index` was completed."""
        with _told(self.uri):
            return self._version.unrelated

    def set_unrelated(self, unrelated: Unrelated) -> None:
        """Notes what unrelated texts reach."""
        metadata = {_UNRELATED: json.dumps(asdict(unrelated))}
        with self._writing():
            self._table.update_field_metadata({"path": "image_vector", "metadata": metadata})

    @property
    def model(self) -> str:
        """Where the model was loaded from that made the index."""
        return resolved(self.uri, self.info.model)

    def model_or(self, given: str | Path | None) -> str:
        """Returns what to load for a search: the model that is given, or the one that made the index.

        Nothing is downloaded because an index names it: the index may be from someone else.

        Raises:
            FileNotFoundError: None is given, and that one is not where it was, or not on this machine.
        """
        if given is not None:
            return str(given)
        is_local = self.info.model.startswith(_BESIDE) or Path(self.info.model).is_absolute()
        if is_local and not Path(self.model).exists():
            raise FileNotFoundError(
                f"{self.uri} was made with the model at {self.model}, which is not there; give where it is now as model"
            )
        if not is_local and not is_downloaded(self.model):
            raise FileNotFoundError(
                f"{self.uri} was made with {self.model} of the hub, which is not on this machine; give it as model to "
                "download it"
            )
        return self.model

    def check_model(self, fingerprint: str, name: str) -> None:
        """Raises a ValueError unless the index was made with a model of this fingerprint."""
        if fingerprint != self.info.fingerprint:
            raise ValueError(
                f"{self.uri} was made with model {self.info.fingerprint} ({self.model}), but {name} is {fingerprint}; "
                "use that model, or make another index with this one"
            )

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yields columns of all rows, damaged ones too."""
        with _told(self.uri):
            yield from _batches(self._table, columns)

    def checked_scan(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yields columns of all rows; an OSError says that one is not as it was written."""
        with _told(self.uri):
            yield from self._checked_batches(self._table, columns)

    def _checked_batches(self, table: Any, columns: Sequence[str]) -> Iterator[pa.Table]:
        for batch in _batches(table, columns_to_check(columns)):
            yield self._checked(pa.Table.from_batches([batch]), columns)

    def paths(self) -> list[str]:
        """Returns the paths of all images."""
        return [path for batch in self.scan(["path"]) for path in batch["path"].to_pylist()]

    def with_digest(self, digest: str) -> list[Indexed]:
        """Returns the images whose file has a SHA-256: none, one, or a few of those that are copies of each other."""
        if memory := self._in_memory():
            found = memory.with_digest(digest, _MAX_COPIES)
        else:
            found = self._found(_is_one_of([digest], "digest"), RETURNED, _MAX_COPIES)
        return [Indexed(**row) for row in found.to_pylist()]

    def frames(self, images: Sequence[Indexed]) -> dict[str, bytes]:
        """Returns the frames of the moments among some images, by path."""
        rows = self.rows(
            [image.path for image in images if image.start is not None], ["path", "frame"]
        )
        return {row["path"]: row["frame"] or b"" for row in rows}

    def rows(self, paths: Sequence[str], columns: Sequence[str] = RETURNED) -> list[dict[str, Any]]:
        """Returns columns of the rows with some paths, as far as they are there, in no order; default: of `Indexed`."""
        found = list[dict[str, Any]]()
        for start in range(0, len(paths), _MAX_PATHS):
            found += self._found(_is_one_of(paths[start : start + _MAX_PATHS]), columns).to_pylist()
        return found

    def _found(self, where: str, columns: Sequence[str], limit: int | None = None) -> pa.Table:
        return self._checked(self._unchecked(where, columns, limit), columns)

    def _unchecked(self, where: str, columns: Sequence[str], limit: int | None = None) -> pa.Table:
        """Returns the rows of a condition with all columns that checking them needs."""
        with _told(self.uri):
            query = self._table.search().where(where).select(columns_to_check(columns))
            return (query if limit is None else query.limit(limit)).to_arrow()

    def _checked(self, rows: pa.Table, columns: Sequence[str]) -> pa.Table:
        """Returns columns of rows that were read with `columns_to_check`, if none of them is damaged."""
        if damaged := damaged_rows(rows):
            path = (
                rows["path"].cast(pa.binary())[damaged[0]].as_py().decode(errors="backslashreplace")
            )
            raise OSError(
                f"{self.uri} has a damaged row, that of {path!r}; make the index again, or copy it again"
            )
        return rows.select(list(columns))

    def examples(self, count: int) -> list[Indexed]:
        """Returns up to `count` images from evenly spread rows, always the same ones of the same table."""
        size = len(self)
        rows = min(count, size)
        places = [(2 * number + 1) * size // (2 * rows) for number in range(rows)]
        with _told(self.uri):
            found = self._table.take_offsets(places).select(columns_to_check(RETURNED)).to_arrow()
        return [Indexed(**row) for row in self._checked(found, RETURNED).to_pylist()]

    def content(
        self,
        image: Indexed,
        *,
        within_root: bool = False,
        fetch: bool = True,
        max_bytes: int | None = None,
        frames: Mapping[str, bytes] | None = None,
    ) -> bytes:
        """Returns the bytes of an image that was indexed, and no others: their digest is compared.

        Args:
            image: What the index has.
            within_root: Refuse a file to which a link leads out of the folder of the images.
            fetch: Open images at URLs too.
            max_bytes: Of an image; None: any number.
            frames: Of moments, as `frames` returned them; None reads that of the image.

        Raises:
            ValueError: The file is outside the folder, is none, is too large, or is not what was indexed.
            OSError: It cannot be read.
        """
        frame = None
        if image.start is not None:
            frame = (self.frames([image]) if frames is None else frames).get(image.path, b"")
        named = image.file_in(self.root)
        if frame is None and isinstance(named, str) and not fetch:
            raise ValueError(
                "the image is at a URL, which is not fetched because an index names it"
            )
        size = image.size if frame is None else len(frame)
        if max_bytes is not None and size > max_bytes:
            raise ValueError(f"the file of the image has {size} bytes, the limit is {max_bytes}")
        if frame is None:
            file = named if isinstance(named, str) else self._real(named, within_root=within_root)
            return read_indexed(file, image)
        if hashlib.sha256(frame).hexdigest() != image.digest:
            raise ValueError("the moment has changed since it was indexed; search again")
        return frame

    def _real(self, named: Path, *, within_root: bool) -> Path:
        file = Path(os.path.realpath(named, strict=True))  # Path.resolve fails on links in a circle
        if within_root and not file.is_relative_to(self.root.resolve()):
            raise ValueError("the file is outside the folder of the index")
        return file

    def open_video(self, moment: Indexed) -> BinaryIO:
        """Opens the video of a moment, unless it is outside the folder of the index or its size or time changed."""
        if moment.start is None or isinstance(named := moment.file_in(self.root), str):
            raise ValueError("it is an image, not a moment of a video")
        rows = self._found(_is_one_of([moment.path]), ["mtime"])
        stream = open_regular(self._real(named, within_root=True))
        status = os.fstat(stream.fileno())
        if (
            status.st_size != moment.size
            or [status.st_mtime_ns // 1000] != rows["mtime"].cast(pa.int64()).to_pylist()
        ):
            stream.close()
            raise ValueError(_CHANGED.format("video"))
        return stream

    def nearest(
        self,
        vector: Float[Tensor, " c"],
        count: int,
        *,
        against: Vectors | None = "images",
        where: str | None = None,
        exact: bool = False,
    ) -> list[Hit]:
        """Returns the images whose vector has the largest cosine with a given one, that first.

        Args:
            vector: Of the query.
            count: How many; fewer if there are no more.
            against: Which vectors; of several of one image the nearest counts. None: those of captions of the moments
                in which something is said, and of all others those of images; `count` of these, then `count` of those.
            where: A condition on the other columns in SQL, such as `width > 800`.
            exact: Compare every vector, even where `create_ann_index` was called.

        Raises:
            ValueError: The condition is none.
            OSError: The index cannot be read, another one has taken its place, or it has a damaged row, or vectors that
                are no numbers, so that nothing finds them.
        """
        with _told(self.uri):
            version = self._version
            there, grouped = version.rows, version.grouped
        count = max(1, min(count, there))
        every = exact or not grouped
        probes = 0 if exact else math.ceil(_PROBED_SHARE * _num_partitions(there))
        hits = []
        kinds: dict[Vectors, str | None] = (
            {against: None} if against else {"images": _SILENT, "captions": _SPOKEN}
        )
        for kind, among in kinds.items():
            self._check_vectors(version, kind)
            of_images, of_all = kind == "images", where is None and among is None
            memory = self._in_memory(load=True) if of_all and of_images and every else None
            rows = (memory and memory.nearest(vector, count)) or self._nearest_rows(
                vector, count, kind, where, among, probes
            )
            if (
                not every and of_images and len(rows) < count
            ):  # the partitions that were read had no more
                rows = self._nearest_rows(vector, count, kind, where, among, probes=0)
            if of_all and of_images and every and len(rows) < count and len(rows) < len(self):
                raise OSError(
                    f"{self.uri} has vectors with NaN, which no search finds; make the index again"
                )
            hits += [self.hit(row, kind, 1 - row.pop("_distance")) for row in rows]
        return sorted(hits, key=lambda one: (one.against == "captions", -one.cosine, one.path))

    def containing(
        self, text: str, vector: Float[Tensor, " c"], count: int, *, where: str | None = None
    ) -> list[Hit]:
        """Returns what has words of a text in its captions or its transcript, by BM25, best first.

        Case, accents and endings of English words make no difference; English stop words count for nothing. There is
        no syntax: quotation marks, operators and other signs only separate words.

        Args:
            text: The words.
            vector: Of the query, for the cosine of the images that are found.
            count: How many; fewer if no more have one of the words.
            where: As in `nearest`.

        Raises:
            ValueError: The condition is none.
        """
        self._check_vectors(self._version, "images")
        memory = self._in_memory()
        own = [*RETURNED, "image_vector"]
        table, columns = (
            (memory.table.lance, ["_rowid"]) if memory else (self._table, columns_to_check(own))
        )
        words = MatchQuery(text, "captions")  # type: ignore[call-arg]  # a string would be parsed as a phrase
        query = table.search(words, query_type="fts").limit(count)
        if where is not None:
            query = query.where(_whole(where), prefilter=True)
        with _told(self.uri, where=where):
            found = query.select([*columns, "_score"]).to_arrow()
        scores = found["_score"].to_pylist()
        if memory:
            found, vectors = memory.with_ids(found["_rowid"].to_numpy())
        else:
            found = self._checked(found, own)
            vectors = (
                found["image_vector"]
                .combine_chunks()
                .flatten()
                .to_numpy()
                .reshape(-1, self.info.image_width)
            )
        cosines = F.cosine_similarity(torch.tensor(vectors), vector[None]).tolist()
        numbers = zip(found.select(RETURNED).to_pylist(), cosines, scores, strict=True)
        hits = [self.hit(row, "words", cosine, score) for row, cosine, score in numbers]
        return sorted(hits, key=lambda one: (-one.rank_score, one.path))

    def hit(
        self, row: Mapping[str, Any], against: Against, cosine: float, score: float | None = None
    ) -> Hit:
        """Returns a row of the columns RETURNED as what was found, ranked by its score or else by its cosine."""
        image = Indexed(**{**row, "captions": tuple(row["captions"])})
        try:
            file = image.file_in(self.root)
        except ValueError as error:  # of a damaged row; the condition is not at fault
            raise OSError(f"{self.uri} cannot be read: {error}") from error
        cosine = max(-1.0, min(1.0, cosine))  # which rounding may exceed
        rank_score = cosine if score is None else score
        return Hit(file=file, against=against, cosine=cosine, rank_score=rank_score, **vars(image))

    @property
    def _version(self) -> _Version:
        """The newest one."""
        with _told(self.uri):
            table, known = self._table, self._known
            if known.table is not table or known.number != table.version:
                if IndexInfo.of(self.uri, table.schema) != self.info:
                    raise OSError(
                        f"{self.uri} was replaced by an index of another model or folder; open it again"
                    )
                newer = _Version(table)
                if known.table is table:
                    newer.checked = known.checked
                known = self._known = newer
        return known

    def _check_vectors(self, version: _Version, kind: Vectors) -> None:
        """Compares all rows and vectors of a small index with their CRCs, once after it was opened.

        Lance only gives what it finds nearest: a row that damage makes farther would be missing without a word. In a
        larger index all are compared when they are read into memory, and before that those that are found.
        """
        if version.rows < _FEWEST and kind not in version.checked:
            for _ in self.checked_scan([COLUMNS[kind]]):
                pass
            version.checked.add(kind)

    def _in_memory(self, *, load: bool = False) -> Memory | None:
        """Returns all rows of the newest version, which the second exact search in it loads."""
        known = self._version
        if (
            load and known.memory is None and known.loading.acquire(blocking=False)
        ):  # others read the table meanwhile
            with _told(self.uri):
                try:
                    if known.searched and _FEWEST <= known.rows <= _MOST / (
                        4 * self.info.image_width
                    ):
                        table = Table(self.uri, version=known.number)
                        rows = self._checked_batches(
                            table.lance, [*RETURNED, "_rowid", "image_vector"]
                        )
                        known.memory = Memory(table, rows, "image_vector")
                    known.searched = True
                finally:
                    known.loading.release()
        return known.memory

    def _nearest_rows(
        self,
        vector: Float[Tensor, " c"],
        count: int,
        kind: Vectors,
        where: str | None,
        among: str | None,
        probes: int,
    ) -> list[dict[str, Any]]:
        """Searches so many partitions, 0 for all vectors; where there are no partitions, both are the same."""
        query = self._table.search(vector.numpy(), vector_column_name=COLUMNS[kind])
        query = query.distance_type("cosine").limit(count)
        query = (
            query.nprobes(probes).refine_factor(_REFINED) if probes else query.bypass_vector_index()
        )
        if conditions := [_whole(one) for one in (among, where) if one is not None]:
            query = query.where(" AND ".join(conditions), prefilter=True)
        try:
            with _told(self.uri, where=where):
                found = query.select(
                    columns_to_check([*RETURNED, COLUMNS[kind], "_distance"])
                ).to_arrow()
        except ValueError:
            self._nearest_rows(
                vector, 1, kind, None, None, probes
            )  # of a damaged index this fails too, with OSError
            raise
        return self._checked(found, [*RETURNED, "_distance"]).to_pylist()

    def upsert(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes images in one commit; those that are there are replaced."""
        for row in rows:
            if not all(
                np.isfinite(row[name]).all()
                for name in ("image_vector", "text_vectors", "pair_vectors")
            ):
                raise ValueError(
                    f"{row['path']!r} has a vector with NaN or infinite values; nothing would find it"
                )
            if not np.any(row["image_vector"]):
                raise ValueError(
                    f"{row['path']!r} has a vector of zeros, which nothing finds; check the model"
                )
        if not rows:
            return
        schema, defaults = (
            self._table.schema,
            {"size": 0, "mtime": 0, "version": "", "part_size": 0, "location": ""},
        )
        several = ("text_vectors", "pair_vectors")
        given = [{**defaults, **row, **{name: list(row[name]) for name in several}} for row in rows]
        columns = [field for field in schema if field.name not in (ROW_CRC, *CRCS.values())]
        table = with_crcs(pa.Table.from_pylist(given, pa.schema(columns))).select(schema.names)
        with self._writing():
            self._table.merge_insert(
                "path"
            ).when_matched_update_all().when_not_matched_insert_all().execute(table)

    def reuse(self, images: Sequence[Mapping[str, Any]]) -> set[str]:
        """Writes images with the vectors of others that have the same digest and captions; returns their paths."""
        if not images:
            return set()
        where = f"start IS NULL AND width > 0 AND {_is_one_of({one['digest'] for one in images}, 'digest')}"
        left_out = {"mtime", ROW_CRC, *CRCS.values()}  # a time may be none that Python has
        names = [name for name in self._table.schema.names if name not in left_out]
        found = self._unchecked(where, names)
        whole = np.delete(
            np.arange(len(found)), damaged_rows(found)
        )  # the others are embedded anew
        rows = {
            (row["digest"], tuple(row["captions"])): row
            for row in found.select(names).take(whole).to_pylist()
        }
        known = [
            rows[key] | one
            for one in images
            if (key := (one["digest"], tuple(one["captions"]))) in rows
        ]
        self.upsert(known)
        return {row["path"] for row in known}

    def set_versions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Gives the rows of some paths another `version` and `part_size`."""
        for version, part_size in {(row["version"], row["part_size"]) for row in rows}:
            paths = [
                row["path"]
                for row in rows
                if (row["version"], row["part_size"]) == (version, part_size)
            ]
            with self._writing():
                self._table.update(
                    where=_is_one_of(paths), values={"version": version, "part_size": part_size}
                )

    def remove(self, paths: Sequence[str]) -> None:
        """Deletes rows."""
        for start in range(0, len(paths), _MAX_PATHS):
            with self._writing():
                self._table.delete(_is_one_of(paths[start : start + _MAX_PATHS]))

    def image_vectors(self) -> Iterator[Float[np.ndarray, "n c"]]:
        """Yields the vectors of all images; an OSError says that a row is not as it was written."""
        for rows in self.checked_scan(["image_vector"]):
            vectors = rows["image_vector"].combine_chunks().flatten()
            yield vectors.to_numpy().reshape(-1, self.info.image_width)

    def create_ann_index(self) -> None:
        """Groups the images' vectors, so that searches compare only those of the groups nearest to the query."""
        settings: Any = {"sample_rate": _SAMPLED, "max_iterations": _ITERATIONS}
        config = IvfSq(
            distance_type="cosine", num_partitions=_num_partitions(len(self)), **settings
        )
        with self._writing():
            self._table.create_index("image_vector", config=config, replace=True)

    @property
    def has_ann_index(self) -> bool:
        """Whether `create_ann_index` was called."""
        return self._version.grouped

    def optimize(self, num_replaced: int = 0) -> None:
        """Tidies the table where that makes it smaller or quicker, after so many rows were deleted or replaced."""
        fragments = self._table.stats()["fragment_stats"]["num_fragments"]
        indexes = {index.columns[0]: index.name for index in self._table.list_indices()}
        outside = max(
            (self._table.index_stats(name).num_unindexed_rows for name in indexes.values()),
            default=0,
        )
        with self._writing():
            if fragments > _MAX_FRAGMENTS or 10 * max(num_replaced, outside) > len(self):
                Table(self.uri).compact(_KEPT)
                self._table.checkout_latest()
            if len(self) >= _LOOKED_UP_FROM:
                for column in set(_LOOKED_UP) - indexes.keys():
                    self._table.create_index(column, config=BTree())


def location_of(image: Image, path: str, root: Uri) -> str:
    """Returns where an image is in a shard, table or video, or at which URL, as JSON; empty for a file at its path."""
    if is_url(image.location):
        file = {"url": image.location}
    elif image.is_file and os.path.normpath(Path(root) / path) == os.path.normpath(image.location):
        return ""
    else:
        file = {"file": os.path.relpath(image.location, root)}
    return json.dumps(file | json.loads(image.located() or "{}"))


def read_indexed(file: Path | str, image: Indexed) -> bytes:
    """Returns the bytes of an image in a file if they are those that were indexed: their digest is compared."""
    where = image.where()
    piece, cell = (tuple(where[name]) if name in where else None for name in ("piece", "cell"))
    if piece and piece[1] != image.size:  # which limits are for
        raise ValueError(
            f"the index has {image.size} bytes, and {piece[1]} as the length of the image; make it again"
        )
    check_length(image.path, image.size)
    if not is_url(file):
        with open_regular(file) as opened:
            if not (piece or cell) and os.fstat(opened.fileno()).st_size != image.size:
                raise ValueError(_CHANGED.format("image"))
    content = Image(name=image.path, location=str(file), piece=piece, cell=cell).read(BRIEF)
    if hashlib.sha256(content).hexdigest() != image.digest:
        raise ValueError(_CHANGED.format("image"))
    return content


def _whole(condition: str) -> str:
    """Encloses a condition twice: what follows a complete one, as after a parenthesis too many, would be ignored."""
    return f"(({condition}\n))"


@contextmanager
def _told(uri: str, what: str = "read", where: str | None = None) -> Iterator[None]:
    """Turns LanceDB's errors into OSError of one line; those of a condition into ValueError."""
    try:
        yield
    except Exception as error:
        is_lance = (
            isinstance(error, RuntimeError | ValueError) or type(error).__name__ == "RustPanic"
        )
        if isinstance(error, OSError) or not is_lance:
            raise
        if where is not None:
            raise ValueError(
                f"where is {where!r}: {message_of(error)}; columns are {', '.join(ABOUT)}"
            ) from error
        message = message_of(error)
        is_damaged = what == "read" and not message.startswith("the store answers")
        advice = "; make the index again" if is_damaged else ""
        raise OSError(f"{uri} cannot be {what}: {message}{advice}") from error


def _batches(table: Any, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    yield from table.search().select(list(columns)).to_batches()


def _num_partitions(num_rows: int) -> int:
    return max(1, round(2 * num_rows**0.5))


def _is_one_of(values: Collection[str], column: str = "path") -> str:
    """Returns the condition that a row's path is one of these; a quotation mark in a name is doubled."""
    names = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
    return f"{column} IN ({names})"


def portable(uri: Uri, path: Uri) -> str:
    """A path within the folder that a local index is in is kept relative, so that both can be moved together."""
    if is_url(path):
        return str(path)
    absolute = Path(path).resolve()
    beside = None if is_url(uri) else Path(uri).resolve().parent
    if beside is None or not absolute.is_relative_to(beside):
        return str(absolute)
    return _BESIDE + os.path.relpath(absolute, beside)


def resolved(uri: Uri, path: str) -> str:
    """Undoes `portable`; absolute paths and hub ids stay."""
    return str(Path(uri).parent / path) if path.startswith(_BESIDE) else path
