"""An index of images: a LanceDB table with a row per image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import torch.nn.functional as F
from jaxtyping import Float
from lancedb.index import BTree, IvfSq
from torch import Tensor

from bridgetower.bulk.lance import Uri, split
from bridgetower.bulk.lance_errors import condition, reading, writing
from bridgetower.checkpoints import is_downloaded
from bridgetower.data.remote import is_url
from bridgetower.search.connection import connect, opened_table
from bridgetower.search.contents import checked_frame, content_of, open_video
from bridgetower.search.exact import ExactVectors, largest_products
from bridgetower.search.table import (
    ABOUT,
    Hit,
    Indexed,
    IndexedRow,
    IndexInfo,
    SourceImage,
    VectorColumn,
    check_columns,
    file_of,
    info_of,
    is_one_of,
    is_path,
    portable,
    resolved,
    schema_of,
    table_of,
)

_KEPT = timedelta(hours=1)  # for readers of an older version
_MAX_FRAGMENTS = 20
_LOOKED_UP, _LOOKED_UP_FROM = ("digest", "path"), 10_000  # columns that get an index, and rows from which on
_PROBED_SHARE = 0.3  # of the partitions; benchmarks/search.py measures its cost and recall
_SAMPLED, _ITERATIONS = 64, 10  # vectors of a partition and rounds by which partitions are found
_REFINED = 4  # times as many are ranked again by their full vectors
_MAX_PATHS = 1000  # in one condition
_MAX_COPIES = 8  # of one file that are returned
_RETURNED = ("digest", "path", "size", "width", "height", "captions", "place", "start", "end")


class Index:
    """Images and their vectors.

    The folder is a Lance table, which other tools read too. Every change is one atomic commit: a process that is killed
    leaves the table as it was before or after.

    Attributes:
        uri: Of the folder, whose name ends in `.lance`; an object store's (`s3://…`, `gs://…`, `az://…`) will do.
        info: What it is of.
    """

    def __init__(self, uri: Uri, *, root: Path | None = None, storage_options: Mapping[str, str] | None = None) -> None:
        """Opens an index.

        Args:
            uri: Of the folder.
            root: Folder of the images, if they are elsewhere now.
            storage_options: Settings of an object store; its usual environment variables are read too.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is something else.
        """
        self.uri, self._root, self._storage_options = str(uri), root, storage_options
        self._opened: tuple[Any, tuple[int, int] | None] | None = None
        table = self._table
        self._spoken: tuple[int, int] | None = None  # of a version
        self._exact = None if is_url(uri) else ExactVectors(Path(uri))
        self.info = info_of(uri, table.schema)
        check_columns(uri, table.schema, self.info)

    @classmethod
    def create(
        cls,
        uri: Uri,
        *,
        fingerprint: str,
        model: str,
        root: Uri,
        image_width: int,
        pair_width: int,
        storage_options: Mapping[str, str] | None = None,
    ) -> Index:
        """Makes an empty index.

        Args:
            uri: Of the folder, which must not exist.
            fingerprint: Of the model.
            model: Where it was loaded from.
            root: Folder of the images.
            image_width: Numbers in a contrastive vector.
            pair_width: Numbers in a joint vector.
            storage_options: Settings of an object store.
        """
        place, name = split(uri)
        info = IndexInfo(
            fingerprint=fingerprint,
            model=portable(uri, model) if Path(model).exists() else model,
            root=portable(uri, root),
        )
        with writing(str(uri)):
            schema = schema_of(info, image_width, pair_width)
            connect(place, storage_options).create_table(name, schema=schema)
        return cls(uri, storage_options=storage_options)

    @staticmethod
    def exists(uri: Uri, *, storage_options: Mapping[str, str] | None = None) -> bool:
        """Whether there is a table.

        Raises:
            ValueError: The name is none for an index.
        """
        return opened_table(uri, storage_options) is not None

    @property
    def _table(self) -> Any:
        """The table, opened again where another one, whose versions have the same numbers, has taken its place."""
        folder = None
        if not is_url(self.uri) and Path(self.uri).is_dir():
            status = Path(self.uri).stat()
            folder = status.st_ino, status.st_ctime_ns
        if self._opened is None or self._opened[1] != folder:
            table = opened_table(self.uri, self._storage_options)
            if table is None:
                raise FileNotFoundError(
                    f"no index at {self.uri}; make one with bridgetower index PHOTOS --out {self.uri}"
                )
            self._opened = table, folder
        return self._opened[0]

    def __len__(self) -> int:
        with reading(self.uri):
            return int(self._table.count_rows())

    @property
    def root(self) -> Path:
        """Folder that the images' paths start from."""
        return self._root or Path(resolved(self.uri, self.info.root))

    @property
    def num_spoken(self) -> int:
        """How many entries are moments in which something is said.

        Raises:
            OSError: The index cannot be read.
        """
        with reading(self.uri):
            version = self._table.version
            if self._spoken is None or self._spoken[0] != version:
                self._spoken = version, self._table.count_rows("start IS NOT NULL AND array_length(captions) > 0")
        return self._spoken[1]

    def is_of(self, root: Path | str) -> bool:
        """Whether its images are those of a folder or of a URL."""
        if is_url(root) or is_url(self.info.root):
            return str(root) == self.info.root
        return self.root.resolve() == Path(root).resolve()

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
        if is_path(self.info.model) and not Path(self.model).exists():
            raise FileNotFoundError(
                f"{self.uri} was made with the model at {self.model}, which is not there; give where it is now as model"
            )
        if not is_path(self.info.model) and not is_downloaded(self.model):
            raise FileNotFoundError(
                f"{self.uri} was made with {self.model} of the hub, which is not on this machine; give it as model to "
                "download it"
            )
        return self.model

    def check_model(self, fingerprint: str, name: str) -> None:
        """Checks that the index was made with a model.

        Args:
            fingerprint: Of the model.
            name: What to call it.

        Raises:
            ValueError: It was made with another one.
        """
        if fingerprint != self.info.fingerprint:
            raise ValueError(
                f"{self.uri} was made with model {self.info.fingerprint} ({self.model}), but {name} is {fingerprint}; "
                "use that model, or make another index with this one"
            )

    def listed(self) -> Iterator[SourceImage]:
        """Yields every image as its source named it when it was written."""
        columns = ["path", "size", "mtime", "captions", "place"]
        with reading(self.uri):
            for batch in self._table.search().select(columns).to_batches():
                values = {name: batch[name] for name in columns}
                values["mtime"] = values["mtime"].cast(pa.int64())
                for row in zip(*(values[name].to_pylist() for name in columns), strict=True):
                    path, size, mtime, captions, place = row
                    yield SourceImage(path=path, size=size, mtime=mtime, captions=tuple(captions), place=place)

    def with_digest(self, digest: str) -> list[Indexed]:
        """Returns the images whose file has a SHA-256: none, one, or a few of those that are copies of each other.

        Raises:
            OSError: The index cannot be read.
        """
        with reading(self.uri):
            rows = self._table.search().where(is_one_of([digest], "digest")).select(list(_RETURNED)).limit(_MAX_COPIES)
            return [Indexed(**row) for row in rows.to_list()]

    def with_paths(self, paths: Sequence[str]) -> list[Indexed]:
        """Returns the images with some paths, in no order."""
        with reading(self.uri):
            return [
                Indexed(**row)
                for chunk in _chunks(paths)
                for row in self._table.search().where(is_one_of(chunk)).select(list(_RETURNED)).to_list()
            ]

    def image_vectors(self, paths: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns the vectors of the images with some paths, as far as they are there."""
        with reading(self.uri):
            return {
                row["path"]: np.array(row["image_vector"], np.float32)
                for chunk in _chunks(paths)
                for row in self._table.search().where(is_one_of(chunk)).select(["path", "image_vector"]).to_list()
            }

    def examples(self, count: int) -> list[Indexed]:
        """Returns up to `count` images from evenly spread rows, always the same ones of the same table.

        Raises:
            OSError: The index cannot be read.
        """
        size = len(self)
        rows = min(count, size)
        places = [(2 * number + 1) * size // (2 * rows) for number in range(rows)]
        with reading(self.uri):
            return [Indexed(**row) for row in self._table.take_offsets(places).select(list(_RETURNED)).to_list()]

    def frames(self, images: Sequence[Indexed]) -> dict[str, bytes]:
        """Returns the frames of the moments among some images, by path.

        Raises:
            OSError: The index cannot be read.
        """
        paths = [image.path for image in images if image.start is not None]
        with reading(self.uri):
            return {
                row["path"]: bytes(row["frame"] or b"")
                for chunk in _chunks(paths)
                for row in self._table.search().where(is_one_of(chunk)).select(["path", "frame"]).to_list()
            }

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
        if image.start is not None:
            found = self.frames([image]) if frames is None else frames
            return checked_frame(image, found.get(image.path), max_bytes)
        return content_of(image, self.root, within_root=within_root, fetch=fetch, max_bytes=max_bytes)

    def open_video(self, moment: Indexed) -> BinaryIO:
        """Opens the video of a moment that was indexed, and no other file: its size and time are compared.

        Raises:
            ValueError: It is no moment, or its file is outside the folder of the index or not what was indexed.
            OSError: It cannot be read.
        """
        return open_video(self._table, self.uri, moment, self.root)

    def nearest(
        self,
        vector: Float[Tensor, " c"],
        count: int,
        *,
        column: VectorColumn = "image_vector",
        where: str | None = None,
        exact: bool = False,
    ) -> list[Hit]:
        """Returns the images whose vector has the largest cosine with a given one, that first.

        Args:
            vector: Of the query.
            count: How many; fewer if there are no more.
            column: Which vectors; of several of one image the nearest counts.
            where: A condition on the other columns in SQL, such as `width > 800`.
            exact: Compare every vector, even where `create_ann_index` was called.

        Raises:
            ValueError: The condition is none.
            OSError: The index cannot be read, another one has taken its place, or it has vectors that are no numbers,
                so that nothing finds them.
        """
        with reading(self.uri):
            there, info = len(self), info_of(self.uri, self._table.schema)
        count = max(1, min(count, there))
        if info != self.info:
            raise OSError(f"{self.uri} was replaced by an index of another model or folder; open it again")
        every = exact or not self.has_ann_index
        if where is None and column == "image_vector" and every and (found := self._all_compared(vector, count)):
            return found
        probes = 0 if exact else math.ceil(_PROBED_SHARE * _num_partitions(there))
        rows = self._nearest_rows(vector, count, column, where, probes)
        if not every and column == "image_vector" and len(rows) < count:  # the partitions that were read had no more
            rows = self._nearest_rows(vector, count, column, where, probes=0)
        unhidden = where is None and column == "image_vector" and every
        if unhidden and len(rows) < min(count, len(self)):
            raise OSError(f"{self.uri} has vectors with NaN, which no search finds; make the index again")
        return self._hits(rows)

    def _nearest_rows(
        self, vector: Float[Tensor, " c"], count: int, column: VectorColumn, where: str | None, probes: int
    ) -> list[dict[str, Any]]:
        """Searches so many partitions, 0 for all vectors; where there are no partitions, both are the same."""
        query = self._table.search(vector.numpy(), vector_column_name=column).distance_type("cosine").limit(count)
        query = query.nprobes(probes).refine_factor(_REFINED) if probes else query.bypass_vector_index()
        if where is not None:
            query = query.where(where, prefilter=True)
        query = query.select([*_RETURNED, "_distance"])
        try:
            with reading(self.uri) if where is None else condition(where, ABOUT):
                found: list[dict[str, Any]] = query.to_list()
        except ValueError:
            self._nearest_rows(vector, 1, column, None, probes)  # of a damaged index this fails too, with OSError
            raise
        return found

    def _all_compared(self, vector: Float[Tensor, " c"], count: int) -> list[Hit] | None:
        """Returns the images with the largest cosines by the array of vectors; None if it is not of this version."""
        table, version = self._table, self._table.version
        vectors = self._exact.of(version) if self._exact else None
        if vectors is None:
            return None
        rows, cosines = largest_products(vectors, F.normalize(vector, dim=0).numpy(), count)
        order = rows.argsort()
        with reading(self.uri):
            found = table.take_offsets(rows[order].tolist()).select(list(_RETURNED)).to_list()
            if self._table is not table or table.version != version:  # it was written meanwhile
                return None
        return self._hits(
            row | {"_distance": 1 - cosine} for row, cosine in zip(found, cosines[order].tolist(), strict=True)
        )

    def _hits(self, rows: Iterable[Mapping[str, Any]]) -> list[Hit]:
        """Returns rows as hits, best first.

        Raises:
            OSError: A row names no place of an image; the condition of a search is not at fault.
        """
        hits = []
        for row in rows:
            image = Indexed(**{name: row[name] for name in _RETURNED} | {"captions": tuple(row["captions"])})
            try:
                file = file_of(image, self.root)
            except ValueError as error:
                raise OSError(f"{self.uri} cannot be read: {error}") from error
            hits.append(Hit(file=file, cosine=1 - row["_distance"], **vars(image)))
        return sorted(hits, key=lambda one: (-one.cosine, one.path))

    def upsert(self, rows: Sequence[IndexedRow]) -> None:
        """Writes images in one commit; those that are there are replaced.

        Raises:
            ValueError: A vector has values that are no numbers, or zeros alone.
        """
        for row in rows:
            if not row.is_finite:
                raise ValueError(f"{row.source.path!r} has a vector with NaN or infinite values; nothing would find it")
            if not row.image_vector.any():
                raise ValueError(f"{row.source.path!r} has a vector of zeros, which nothing finds; check the model")
        if rows:
            self._merge(table_of(rows, self._table.schema))

    def _merge(self, rows: pa.Table) -> None:
        with writing(self.uri):
            self._table.merge_insert("path").when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def reuse(self, images: Mapping[SourceImage, str]) -> set[str]:
        """Writes images, given with their digests, with the vectors of others that have the same content and captions.

        Returns:
            The paths of those for which there are some.
        """
        if not images:
            return set()
        where = f"start IS NULL AND width > 0 AND {is_one_of(set(images.values()), 'digest')}"
        with reading(self.uri):
            rows = self._table.search().where(where).to_arrow()
        keys = zip(rows["digest"].to_pylist(), map(tuple, rows["captions"].to_pylist()), strict=True)
        numbers = {key: number for number, key in enumerate(keys)}
        known = {one: numbers[key] for one, digest in images.items() if (key := (digest, one.captions)) in numbers}
        if known:
            written = rows.take(list(known.values()))
            for name in ("path", "size", "mtime", "place"):
                values = pa.array([getattr(one, name) for one in known])
                field = written.schema.field(name)
                written = written.set_column(written.schema.get_field_index(name), field, values.cast(field.type))
            self._merge(written)
        return {one.path for one in known}

    def remove(self, paths: Iterable[str]) -> None:
        """Deletes rows."""
        for chunk in _chunks(list(paths)):
            with writing(self.uri):
                self._table.delete(is_one_of(chunk))

    def create_ann_index(self) -> None:
        """Groups the images' vectors, so that searches compare only those of the groups nearest to the query.

        Images that are written later are compared one by one until the table is tidied. Vectors of captions and of
        pairs are always compared one by one.
        """
        partitions = _num_partitions(len(self))
        config = IvfSq(
            distance_type="cosine", num_partitions=partitions, sample_rate=_SAMPLED, max_iterations=_ITERATIONS
        )
        with writing(self.uri):
            self._table.create_index("image_vector", config=config, replace=True)

    @property
    def has_ann_index(self) -> bool:
        """Whether `create_ann_index` was called."""
        return "image_vector" in self._indexes()

    def _indexes(self) -> dict[str, str]:
        """Returns the names of the indexes by the column that each is of."""
        return {index.columns[0]: index.name for index in self._table.list_indices()}

    def write_exact(self) -> None:
        """Writes the vectors of images in one array beside the table, if it is large, for searches that compare all."""
        if self._exact is None:
            return
        width = self._table.schema.field("image_vector").type.list_size
        with writing(self.uri):
            batches = self._table.search().select(["image_vector"]).to_batches()
            parts = (batch["image_vector"].flatten().to_numpy().reshape(-1, width) for batch in batches)
            self._exact.write(self._table.version, len(self), width, parts)

    def optimize(self, num_replaced: int = 0) -> None:
        """Rewrites the table where that makes it smaller or quicker, and forgets versions that nobody reads any more.

        Args:
            num_replaced: Rows that were deleted or replaced since it was tidied.
        """
        fragments, indexes = self._table.stats()["fragment_stats"]["num_fragments"], self._indexes()
        outside = max((self._table.index_stats(name).num_unindexed_rows for name in indexes.values()), default=0)
        with writing(self.uri):
            if fragments > _MAX_FRAGMENTS or 10 * max(num_replaced, outside) > len(self):
                self._table.optimize(cleanup_older_than=_KEPT)
            if len(self) >= _LOOKED_UP_FROM:
                for column in set(_LOOKED_UP) - indexes.keys():
                    self._table.create_index(column, config=BTree())


def _num_partitions(num_rows: int) -> int:
    return max(1, round(2 * num_rows**0.5))


def _chunks(items: Sequence[str]) -> Iterator[Sequence[str]]:
    return (items[start : start + _MAX_PATHS] for start in range(0, len(items), _MAX_PATHS))
