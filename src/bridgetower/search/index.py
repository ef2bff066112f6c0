"""An index of images: a Lance table with a row for each image, and searches of its vectors and words."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cached_property, partial
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
from bridgetower.data.sources.fetch import is_url, open_regular
from bridgetower.files import json_object, parse_json
from bridgetower.plain import from_plain
from bridgetower.search.checksums import CRCS, ROW_CRC, columns_to_check, damaged_rows, with_crcs
from bridgetower.search.conditions import quoted
from bridgetower.search.config import Against, Vectors
from bridgetower.search.indexed import CHANGED, Hit, Indexed, read_indexed
from bridgetower.search.memory import Memory

RETURNED = ("digest", "path", "size", "width", "height", "captions", "location", "start", "end")
"""Columns of an `Indexed`."""

COLUMNS: dict[Vectors, str] = {
    "images": "image_vector",
    "captions": "text_vectors",
    "pairs": "pair_vectors",
}
"""Columns of vectors."""

_CONDITION_COLUMNS = ("path", "size", "mtime", "width", "height", "captions", "start", "end")
_SPOKEN = "start IS NOT NULL AND array_length(captions) > 0"  # moments in which something is said
_SILENT = f"({_SPOKEN}) IS NOT TRUE"
_NULLABLE = ("start", "end", "frame")  # columns that only moments have
# Of rows that no source wrote.
_DEFAULTS = {"size": 0, "mtime": 0, "version": "", "part_size": 0, "location": ""}
_INFO = b"bridgetower"  # key of the schema's metadata
_UNRELATED = "bridgetower.unrelated"  # key of the metadata of the column of images' vectors
_VERSION = 7
_BESIDE = "./"  # starts paths from the folder that the index is in
_REFRESH_SECONDS = 1.0  # after which a reader notices the changes of another process
_OLD_VERSIONS = timedelta(hours=1)  # for processes that read them
_MAX_FRAGMENTS = 20
_KEYS = ("digest", "path")  # columns with an index of their own
_MIN_ROWS_FOR_KEYS = 10_000
# Share of the partitions that is searched; benchmarks/search.py measures its cost and recall.
_PROBED_SHARE = 0.2
_SAMPLE_RATE = 64  # vectors of each partition from which partitions are computed
_ITERATIONS = 10  # of k-means for the partitions
_REFINE_FACTOR = 4  # times as many hits are ranked again by their full vectors
_MAX_PATHS = 1000  # of one condition
_MAX_COPIES = 8  # of a file that are returned
_MIN_ROWS_IN_MEMORY = 10_000
_MAX_BYTES_IN_MEMORY = 2**32


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """The model and the images of an index."""

    fingerprint: str  # of the model that made the vectors
    model: str  # source of that model; a path may start from the folder that the index is in
    root: str  # folder or URL that the images' paths start from, likewise
    image_width: int  # of the vectors of images and texts
    pair_width: int  # of the vectors of pairs

    def schema(self) -> pa.Schema:
        """Returns the columns of an index, with this info as metadata."""
        image_vector = pa.list_(pa.float32(), self.image_width)
        pair_vector = pa.list_(pa.float32(), self.pair_width)
        fields = {
            "path": pa.string(),
            "size": pa.int64(),
            "mtime": pa.timestamp("us", tz="UTC"),
            "version": pa.string(),  # of the file
            "part_size": pa.int32(),  # in the last row of a table, shard or video, the number of its images; else 0
            "digest": pa.string(),
            "width": pa.int32(),
            "height": pa.int32(),
            "captions": pa.list_(pa.field("item", pa.string(), nullable=False)),
            "location": pa.string(),
            "start": pa.float64(),
            "end": pa.float64(),
            "frame": pa.large_binary(),
            "image_vector": image_vector,
            "text_vectors": pa.list_(image_vector),
            "pair_vectors": pa.list_(pair_vector),
            ROW_CRC: pa.uint32(),
            CRCS["text_vectors"]: pa.uint32(),
            CRCS["pair_vectors"]: pa.uint32(),
        }
        columns = [
            pa.field(name, kind, nullable=name in _NULLABLE) for name, kind in fields.items()
        ]
        content = json.dumps({"version": _VERSION, **asdict(self)})
        return pa.schema(columns, metadata={_INFO: content.encode()})

    @classmethod
    def of(cls, uri: Uri, schema: pa.Schema) -> IndexInfo:
        """Reads the info of a table, and checks that the table has the columns of an index."""
        name = f"what {uri} is of"
        metadata = schema.metadata or {}
        content = parse_json(metadata.get(_INFO, b"{}"), name)
        if not isinstance(content, dict) or content.pop("version", None) != _VERSION:
            raise ValueError(
                f"{uri} is no index of this release; choose another name, or make it again"
            )
        info = from_plain(cls, content, name)
        table_schema = info.schema().append(pa.field(CRC, pa.uint32()))
        if not schema.equals(table_schema):
            raise ValueError(
                f"{uri} has other columns than an index; choose another name, or make it again"
            )
        return info


@dataclass(frozen=True, kw_only=True)
class Unrelated:
    """The cosine of one in twenty unrelated texts with its nearest vector, or None without vectors."""

    rows: int  # of the index when this was computed
    images: float | None = None
    captions: float | None = None
    pairs: float | None = None


class _TableVersion:
    """Cached facts about one version of a table."""

    def __init__(self, table: Any) -> None:
        self.table = table
        self.number = table.version
        self.memory: Memory | None = None
        self.was_searched = False  # exactly and as a whole
        self.loading = Lock()  # of the thread that loads the memory
        self.checked = set[Vectors]()  # kinds of which all vectors were compared with their CRCs

    @cached_property
    def num_rows(self) -> int:
        return int(self.table.count_rows())

    @cached_property
    def num_spoken(self) -> int:
        return int(self.table.count_rows(_SPOKEN))

    @cached_property
    def unrelated(self) -> Unrelated | None:
        metadata = self.table.schema.field("image_vector").metadata or {}
        note = metadata.get(_UNRELATED.encode())
        if note is None:
            return None
        name = "what the index notes of unrelated texts"
        return from_plain(Unrelated, json_object(note.decode(), name), name)

    @cached_property
    def has_ann_index(self) -> bool:
        return any(index.columns == ["image_vector"] for index in self.table.list_indices())


class Index:
    """Images and their vectors.

    The folder is a Lance table, which other tools read too. Every change is one atomic commit: a process that is killed
    leaves the table as it was before or after.

    Attributes:
        uri: Of the folder, whose name ends in `.lance`; an object store's (`s3://…`, `gs://…`, `az://…`) will do.
        info: The model and the images of the index.
    """

    def __init__(self, uri: Uri, *, root: Path | None = None) -> None:
        """Opens an index.

        Args:
            uri: Of the folder; settings of an object store are those of its usual environment variables.
            root: Folder of the images, if they are elsewhere now.

        Raises:
            FileNotFoundError: There is no index.
            ValueError: The folder is something else.
        """
        self.uri = str(uri)
        self._root = root
        split_uri(self.uri)  # refuses a name that no index can have
        self._open_table: Any = None
        self._folder: tuple[int, int] | None = None  # inode and change time of the opened folder
        self._refresh_time = 0.0
        self.info = IndexInfo.of(uri, self._table.schema)
        self._cached = _TableVersion(self._table)

    @classmethod
    def create(cls, uri: Uri, info: IndexInfo) -> Index:
        """Creates an empty index with a full-text index of captions. Paths of `info` may be absolute."""
        info = replace(info, root=portable(uri, info.root))
        if Path(info.model).exists():
            info = replace(info, model=portable(uri, info.model))
        with _lance_errors(str(uri), "written"):
            table = Table.create(uri, info.schema(), checked="image_vector")
            table.lance.create_index("captions", config=FTS())
        return cls(uri)

    @property
    def _table(self) -> Any:
        """The newest version of the table."""
        # Another table at this place may have versions with the same numbers.
        folder = None
        if not is_url(self.uri) and Path(self.uri).is_dir():
            status = Path(self.uri).stat()
            folder = (status.st_ino, status.st_ctime_ns)
        with _lance_errors(self.uri):
            if self._open_table is None or self._folder != folder:
                try:
                    self._open_table = Table(self.uri).lance
                except FileNotFoundError as error:
                    raise FileNotFoundError(
                        f"no index at {self.uri}; make one with bridgetower index PHOTOS --out {self.uri}"
                    ) from error
                self._folder = folder
            elif time.monotonic() - self._refresh_time > _REFRESH_SECONDS:
                self._open_table.checkout_latest()
        self._refresh_time = time.monotonic()
        return self._open_table

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Takes back a commit whose files a full disk has cut off, so that readers keep the version before."""
        try:
            with _lance_errors(self.uri, "written"):
                yield
            Table(self.uri).check_end()
        except OSError:
            with suppress(OSError):
                Table(self.uri).recover()
            self._open_table = None
            raise

    def __len__(self) -> int:
        with _lance_errors(self.uri):
            return int(self._table.count_rows())

    @cached_property
    def root(self) -> Path:
        """Folder that the images' paths start from."""
        if self._root:
            return self._root
        return Path(resolved(self.uri, self.info.root))

    @property
    def num_spoken(self) -> int:
        """Number of the moments in which something is said."""
        with _lance_errors(self.uri):
            return self._version.num_spoken

    @property
    def unrelated(self) -> Unrelated | None:
        """Cosines of unrelated texts, or None before a run of `bridgetower index` was completed."""
        with _lance_errors(self.uri):
            return self._version.unrelated

    def set_unrelated(self, unrelated: Unrelated) -> None:
        """Notes the cosines of unrelated texts."""
        metadata = {_UNRELATED: json.dumps(asdict(unrelated))}
        with self._writing():
            self._table.update_field_metadata({"path": "image_vector", "metadata": metadata})

    @property
    def model(self) -> str:
        """Source of the model that made the index."""
        return resolved(self.uri, self.info.model)

    def model_or(self, model: str | Path | None) -> str:
        """Returns the model to load for a search: the argument, or the model that made the index.

        Nothing is downloaded because an index names it, as the index may be from someone else.

        Raises:
            FileNotFoundError: The argument is None, and the model of the index is not on this machine.
        """
        if model is not None:
            return str(model)
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
        with _lance_errors(self.uri):
            yield from _scan_table(self._table, columns)

    def checked_scan(self, columns: Sequence[str], table: Any = None) -> Iterator[pa.Table]:
        """Yields columns of all rows, of another version with `table`.

        Raises:
            OSError: A row is not as it was written.
        """
        with _lance_errors(self.uri):
            lance = self._table if table is None else table
            for batch in _scan_table(lance, columns_to_check(columns)):
                rows = pa.Table.from_batches([batch])
                yield self._checked(rows, columns)

    def check_rows(self, columns: Iterable[str]) -> None:
        """Compares all rows and columns of vectors with their CRCs.

        Raises:
            OSError: A row is not as it was written.
        """
        for _ in self.checked_scan(list(columns)):
            pass

    def paths(self) -> list[str]:
        """Returns the paths of all images."""
        paths = []
        for batch in self.scan(["path"]):
            paths += batch["path"].to_pylist()
        return paths

    def with_digest(self, digest: str) -> list[Indexed]:
        """Returns the images whose file has a SHA-256: none, one, or a few copies."""
        if memory := self._in_memory():
            rows = memory.with_digest(digest, _MAX_COPIES)
        else:
            rows = self._rows_where(_is_one_of([digest], "digest"), RETURNED, _MAX_COPIES)
        return [Indexed(**row) for row in rows.to_pylist()]

    def frames(self, images: Sequence[Indexed]) -> dict[str, bytes]:
        """Returns the frames of the moments among images, by path."""
        moments = [image.path for image in images if image.is_moment]
        rows = self.rows(moments, ["path", "frame"])
        return {row["path"]: row["frame"] or b"" for row in rows}

    def rows(self, paths: Sequence[str], columns: Sequence[str] = RETURNED) -> list[dict[str, Any]]:
        """Returns columns of the rows with these paths, in no order. Unknown paths are ignored."""
        rows = []
        for start in range(0, len(paths), _MAX_PATHS):
            where = _is_one_of(paths[start : start + _MAX_PATHS])
            rows += self._rows_where(where, columns).to_pylist()
        return rows

    def _rows_where(self, where: str, columns: Sequence[str], limit: int | None = None) -> pa.Table:
        rows = self._unchecked_rows(where, columns, limit)
        return self._checked(rows, columns)

    def _unchecked_rows(
        self, where: str, columns: Sequence[str], limit: int | None = None
    ) -> pa.Table:
        """Returns the rows of a condition with all columns that checking them needs."""
        with _lance_errors(self.uri):
            query = self._table.search().where(where)
            query = query.select(columns_to_check(columns))
            if limit is not None:
                query = query.limit(limit)
            return query.to_arrow()

    def _checked(self, rows: pa.Table, columns: Sequence[str]) -> pa.Table:
        """Returns columns of rows that were read with `columns_to_check`, unless one of them is damaged."""
        if damaged := damaged_rows(rows):
            path = rows["path"].cast(pa.binary())[damaged[0]].as_py()
            name = path.decode(errors="backslashreplace")
            raise OSError(
                f"{self.uri} has a damaged row, that of {name!r}; make the index again, or copy it again"
            )
        return rows.select(list(columns))

    def examples(self, count: int) -> list[Indexed]:
        """Returns up to `count` images from evenly spread rows, always the same ones of the same table."""
        num_rows = len(self)
        num_examples = min(count, num_rows)
        indices = [
            (2 * number + 1) * num_rows // (2 * num_examples) for number in range(num_examples)
        ]
        with _lance_errors(self.uri):
            query = self._table.take_offsets(indices).select(columns_to_check(RETURNED))
            rows = query.to_arrow()
        return [Indexed(**row) for row in self._checked(rows, RETURNED).to_pylist()]

    def content(
        self,
        image: Indexed,
        *,
        within_root: bool = False,
        fetch: bool = True,
        max_bytes: int | None = None,
        frames: Mapping[str, bytes] | None = None,
    ) -> bytes:
        """Returns the bytes of an image if they have the digest that was indexed.

        Args:
            image: An image of the index.
            within_root: Refuse a file to which a link leads out of the folder of the images.
            fetch: Open images at URLs too.
            max_bytes: Of an image; None: any number.
            frames: Of moments, as `frames` returned them; None reads that of the image.

        Raises:
            ValueError: The file is outside the folder, is none, is too large, or is not what was indexed.
            OSError: It cannot be read.
        """
        if image.is_moment:
            if frames is None:
                frames = self.frames([image])
            frame = frames.get(image.path, b"")
            _check_size(len(frame), max_bytes)
            if hashlib.sha256(frame).hexdigest() != image.digest:
                raise ValueError("the moment has changed since it was indexed; search again")
            return frame

        file = image.file_in(self.root)
        if isinstance(file, str) and not fetch:
            raise ValueError(
                "the image is at a URL, which is not fetched because an index names it"
            )
        _check_size(image.size, max_bytes)
        if isinstance(file, Path):
            file = self._real_file(file, within_root=within_root)
        return read_indexed(file, image)

    def _real_file(self, file: Path, *, within_root: bool) -> Path:
        file = Path(os.path.realpath(file, strict=True))  # Path.resolve fails on links in a circle
        if within_root and not file.is_relative_to(self.root.resolve()):
            raise ValueError("the file is outside the folder of the index")
        return file

    def open_video(self, moment: Indexed) -> BinaryIO:
        """Opens the video of a moment, unless it is outside the folder of the index or its size or time changed."""
        file = moment.file_in(self.root)
        if moment.start is None or isinstance(file, str):
            raise ValueError("it is an image, not a moment of a video")
        rows = self._rows_where(_is_one_of([moment.path]), ["mtime"])
        stream = open_regular(self._real_file(file, within_root=True))
        status = os.fstat(stream.fileno())
        mtimes = rows["mtime"].cast(pa.int64()).to_pylist()
        if status.st_size != moment.size or mtimes != [status.st_mtime_ns // 1000]:
            stream.close()
            raise ValueError(CHANGED.format("video"))
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
        """Returns the images whose vectors have the largest cosines with a vector, largest first.

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
        with _lance_errors(self.uri):
            version = self._version
            num_rows = version.num_rows
            is_exact = exact or not version.has_ann_index
        count = max(1, min(count, num_rows))
        probes = 0 if exact else math.ceil(_PROBED_SHARE * _num_partitions(num_rows))
        conditions: dict[Vectors, str | None] = {"images": _SILENT, "captions": _SPOKEN}
        if against is not None:
            conditions = {against: None}
        hits = []
        for kind, condition in conditions.items():
            self._check_vectors(version, kind)
            read_rows = partial(
                self._nearest_rows, vector, count, kind, where=where, condition=condition
            )
            has_condition = where is not None or condition is not None
            compares_all = is_exact and kind == "images" and not has_condition
            memory = self._in_memory(load=True) if compares_all else None
            if memory is not None:
                rows = memory.nearest(vector, count)
            else:
                rows = read_rows(probes=probes)
            if kind == "images" and not is_exact and len(rows) < count:
                rows = read_rows(probes=0)  # the partitions that were read have no more
            if compares_all and len(rows) < min(count, len(self)):
                raise OSError(
                    f"{self.uri} has vectors with NaN, which no search finds; make the index again"
                )
            for row in rows:
                cosine = 1 - row.pop("_distance")
                hits.append(self.hit(row, kind, cosine))
        return sorted(hits, key=lambda hit: (hit.against == "captions", -hit.cosine, hit.path))

    def containing(
        self, text: str, vector: Float[Tensor, " c"], count: int, *, where: str | None = None
    ) -> list[Hit]:
        """Returns the images that have words of a text in their captions or transcripts, by BM25, best first.

        Case, accents and endings of English words make no difference; English stop words count for nothing. There is
        no syntax: quotation marks, operators and other signs only separate words.

        Args:
            text: The words.
            vector: Of the query, for the cosine of the images.
            count: How many; fewer if no more have one of the words.
            where: As in `nearest`.

        Raises:
            ValueError: The condition is none.
        """
        self._check_vectors(self._version, "images")
        columns = [*RETURNED, "image_vector"]
        memory = self._in_memory()
        if memory is None:
            table = self._table
            read_columns = columns_to_check(columns)
        else:
            table = memory.table.lance
            read_columns = ["_rowid"]

        # Search the words.
        words = MatchQuery(text, "captions")  # type: ignore[call-arg]  # a string would be parsed as a phrase
        query = table.search(words, query_type="fts").limit(count)
        if where is not None:
            query = query.where(_enclosed(where), prefilter=True)
        with _lance_errors(self.uri, where=where):
            rows = query.select([*read_columns, "_score"]).to_arrow()

        # Compare the vectors of the images.
        scores = rows["_score"].to_pylist()
        if memory is None:
            rows = self._checked(rows, columns)
            vectors = image_matrix(rows)
        else:
            with _lance_errors(self.uri):
                rows, vectors = memory.with_ids(rows["_rowid"].to_numpy())
        cosines = F.cosine_similarity(torch.tensor(vectors), vector[None]).tolist()
        images = rows.select(RETURNED).to_pylist()
        hits = []
        for row, cosine, score in zip(images, cosines, scores, strict=True):
            hits.append(self.hit(row, "words", cosine, score))
        return sorted(hits, key=lambda hit: (-hit.rank_score, hit.path))

    def hit(
        self, row: Mapping[str, Any], against: Against, cosine: float, score: float | None = None
    ) -> Hit:
        """Makes a hit of a row with the columns RETURNED, ranked by its score or else by its cosine."""
        image = Indexed(**{**row, "captions": tuple(row["captions"])})
        try:
            file = image.file_in(self.root)
        except ValueError as error:  # of a damaged row, not of the condition
            raise OSError(f"{self.uri} cannot be read: {error}") from error
        cosine = max(-1.0, min(1.0, cosine))  # which rounding may exceed
        rank_score = cosine if score is None else score
        return Hit(file=file, against=against, cosine=cosine, rank_score=rank_score, **vars(image))

    @property
    def _version(self) -> _TableVersion:
        """The newest version, with its cached facts."""
        with _lance_errors(self.uri):
            table = self._table
            cached = self._cached
            if cached.table is not table or cached.number != table.version:
                if IndexInfo.of(self.uri, table.schema) != self.info:
                    raise OSError(
                        f"{self.uri} was replaced by an index of another model or folder; open it again"
                    )
                self._cached = _TableVersion(table)
                if cached.table is table:
                    self._cached.checked = cached.checked
            return self._cached

    def _check_vectors(self, version: _TableVersion, kind: Vectors) -> None:
        """Compares all rows and vectors of a small index with their CRCs, once after it was opened.

        Lance only returns the nearest: a row that damage makes farther would be missing without a word. The rows of a
        larger index are compared when they are read into memory, and before that the nearest ones.
        """
        if version.num_rows < _MIN_ROWS_IN_MEMORY and kind not in version.checked:
            self.check_rows([COLUMNS[kind]])
            version.checked.add(kind)

    def _in_memory(self, *, load: bool = False) -> Memory | None:
        """Returns all rows of the newest version, which its second exact search loads."""
        version = self._version
        # While one search loads them, others read the table.
        if load and version.memory is None and version.loading.acquire(blocking=False):
            try:
                with _lance_errors(self.uri):
                    if version.was_searched and self._fits_in_memory(version.num_rows):
                        table = Table(self.uri, version=version.number)
                        columns = [*RETURNED, "_rowid", "image_vector"]
                        rows = self.checked_scan(columns, table.lance)
                        version.memory = Memory(table, rows, "image_vector")
                    version.was_searched = True
            finally:
                version.loading.release()
        return version.memory

    def _fits_in_memory(self, num_rows: int) -> bool:
        num_bytes = 4 * self.info.image_width * num_rows
        return num_rows >= _MIN_ROWS_IN_MEMORY and num_bytes <= _MAX_BYTES_IN_MEMORY

    def _nearest_rows(
        self,
        vector: Float[Tensor, " c"],
        count: int,
        kind: Vectors,
        *,
        where: str | None,
        condition: str | None,
        probes: int,
    ) -> list[dict[str, Any]]:
        """Searches the nearest partitions, or all vectors if `probes` is 0 or there are no partitions."""
        query = self._table.search(vector.numpy(), vector_column_name=COLUMNS[kind])
        query = query.distance_type("cosine").limit(count)
        if probes:
            query = query.nprobes(probes).refine_factor(_REFINE_FACTOR)
        else:
            query = query.bypass_vector_index()
        conditions = [_enclosed(sql) for sql in (condition, where) if sql is not None]
        if conditions:
            query = query.where(" AND ".join(conditions), prefilter=True)
        columns = columns_to_check([*RETURNED, COLUMNS[kind], "_distance"])
        try:
            with _lance_errors(self.uri, where=where):
                rows = query.select(columns).to_arrow()
        except ValueError:
            # If the index is damaged, the condition is not at fault, and this raises an OSError.
            self._nearest_rows(vector, 1, kind, where=None, condition=None, probes=probes)
            raise
        return self._checked(rows, [*RETURNED, "_distance"]).to_pylist()

    def upsert(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes images in one commit, in place of those with the same paths."""
        if not rows:
            return
        for row in rows:
            if not all(np.isfinite(row[column]).all() for column in COLUMNS.values()):
                raise ValueError(
                    f"{row['path']!r} has a vector with NaN or infinite values; nothing would find it"
                )
            if not np.any(row["image_vector"]):
                raise ValueError(
                    f"{row['path']!r} has a vector of zeros, which nothing finds; check the model"
                )
        values = []
        for row in rows:
            value = {**_DEFAULTS, **row}
            for name in ("text_vectors", "pair_vectors"):
                value[name] = list(row[name])  # Arrow takes no matrices
            values.append(value)
        schema = self._table.schema
        fields = [field for field in schema if field.name not in (ROW_CRC, *CRCS.values())]
        table = with_crcs(pa.Table.from_pylist(values, pa.schema(fields)))
        with self._writing():
            merge = self._table.merge_insert("path")
            merge = merge.when_matched_update_all().when_not_matched_insert_all()
            merge.execute(table.select(schema.names))

    def reuse(self, images: Sequence[Mapping[str, Any]]) -> set[str]:
        """Writes images whose digest and captions another image has, with its vectors. Returns their paths."""
        if not images:
            return set()
        digests = _is_one_of({image["digest"] for image in images}, "digest")
        ignored = {"mtime", ROW_CRC, *CRCS.values()}  # Python lacks some times of files
        columns = [name for name in self._table.schema.names if name not in ignored]
        rows = self._unchecked_rows(f"start IS NULL AND {digests}", columns)
        undamaged = np.delete(np.arange(len(rows)), damaged_rows(rows))
        rows = rows.select(columns).take(undamaged)
        copies = {_content_key(row): row for row in rows.to_pylist()}
        reused = []
        for image in images:
            if copy := copies.get(_content_key(image)):
                reused.append({**copy, **image})
        self.upsert(reused)
        return {row["path"] for row in reused}

    def set_versions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Gives the rows with these paths another `version` and `part_size`."""
        paths = defaultdict[tuple[str, int], list[str]](list)
        for row in rows:
            paths[row["version"], row["part_size"]].append(row["path"])
        for (version, part_size), names in paths.items():
            values = {"version": version, "part_size": part_size}
            with self._writing():
                self._table.update(where=_is_one_of(names), values=values)

    def remove(self, paths: Sequence[str]) -> None:
        """Deletes rows."""
        for start in range(0, len(paths), _MAX_PATHS):
            where = _is_one_of(paths[start : start + _MAX_PATHS])
            with self._writing():
                self._table.delete(where)

    def image_vectors(self) -> Iterator[Float[np.ndarray, "n c"]]:
        """Yields the vectors of all images. An OSError says that a row is not as it was written."""
        for rows in self.checked_scan(["image_vector"]):
            yield image_matrix(rows)

    def create_ann_index(self) -> None:
        """Groups the images' vectors, so that searches compare only those of the groups nearest to the query."""
        config = IvfSq(
            distance_type="cosine",
            num_partitions=_num_partitions(len(self)),
            sample_rate=_SAMPLE_RATE,
            max_iterations=_ITERATIONS,
        )
        with self._writing():
            self._table.create_index("image_vector", config=config, replace=True)

    @property
    def has_ann_index(self) -> bool:
        """Whether `create_ann_index` was called."""
        return self._version.has_ann_index

    def optimize(self, num_replaced: int = 0) -> None:
        """Compacts the table if many rows were deleted, replaced, or added since the last time."""
        num_fragments = self._table.stats()["fragment_stats"]["num_fragments"]
        indices = {index.columns[0]: index.name for index in self._table.list_indices()}
        statistics = [self._table.index_stats(name) for name in indices.values()]
        num_unindexed = max((index.num_unindexed_rows for index in statistics), default=0)
        num_rows = len(self)
        num_new = max(num_replaced, num_unindexed)
        with self._writing():
            if num_fragments > _MAX_FRAGMENTS or 10 * num_new > num_rows:
                Table(self.uri).compact(_OLD_VERSIONS)
                self._table.checkout_latest()
            if num_rows >= _MIN_ROWS_FOR_KEYS:
                for column in set(_KEYS) - indices.keys():
                    self._table.create_index(column, config=BTree())


def _enclosed(condition: str) -> str:
    """Encloses a condition twice, as Lance would ignore what follows a closing parenthesis too many."""
    return f"(({condition}\n))"


@contextmanager
def _lance_errors(uri: str, action: str = "read", where: str | None = None) -> Iterator[None]:
    """Turns LanceDB's errors into OSErrors of one line, and those of a condition into ValueErrors."""
    try:
        yield
    except Exception as error:
        is_panic = type(error).__name__ == "RustPanic"
        is_lance = is_panic or isinstance(error, RuntimeError | ValueError | IndexError)
        if isinstance(error, OSError) or not is_lance:
            raise
        message = message_of(error)
        if where is not None:
            columns = ", ".join(_CONDITION_COLUMNS)
            raise ValueError(f"where is {where!r}: {message}; columns are {columns}") from error
        is_damaged = action == "read" and not message.startswith("the store answers")
        advice = "; make the index again" if is_damaged else ""
        raise OSError(f"{uri} cannot be {action}: {message}{advice}") from error


def _check_size(size: int, max_bytes: int | None) -> None:
    if max_bytes is not None and size > max_bytes:
        raise ValueError(f"the file of the image has {size} bytes, the limit is {max_bytes}")


def _content_key(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Returns what two images with the same vectors have in common."""
    return row["digest"], tuple(row["captions"])


def _scan_table(table: Any, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    yield from table.search().select(list(columns)).to_batches()


def image_matrix(rows: pa.Table) -> Float[np.ndarray, "n c"]:
    """Returns the vectors of images as a matrix."""
    column = rows["image_vector"].combine_chunks()
    return column.flatten().to_numpy().reshape(-1, column.type.list_size)


def _num_partitions(num_rows: int) -> int:
    return max(1, round(2 * num_rows**0.5))


def _is_one_of(values: Collection[str], column: str = "path") -> str:
    """Returns the condition that a column has one of these values."""
    return f"{column} IN ({', '.join(map(quoted, values))})"


def portable(uri: Uri, path: Uri) -> str:
    """Makes a path relative if it is in the folder of a local index, so that both can be moved together."""
    if is_url(path):
        return str(path)
    absolute = Path(path).resolve()
    if not is_url(uri):
        folder = Path(uri).resolve().parent
        if absolute.is_relative_to(folder):
            return _BESIDE + str(absolute.relative_to(folder))
    return str(absolute)


def resolved(uri: Uri, path: str) -> str:
    """Undoes `portable`. Absolute paths and hub ids stay."""
    if path.startswith(_BESIDE):
        return str(Path(uri).parent / path)
    return path
