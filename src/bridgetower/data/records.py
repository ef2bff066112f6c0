"""Rows of prepared sets, and the Parquet file that they are written to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bridgetower.data.folder import FORMAT, SplitInfo
from bridgetower.data.parquet import read_schema
from bridgetower.data.schema import CAPTIONS, Schema
from bridgetower.files import replacing, sha256_of

_MARK = b"bridgetower"  # schema metadata key: marks our own Parquet files, which may be replaced


class ImageFile(NamedTuple):
    """An image file.

    Attributes:
        name: Under which it is stored, extension included.
        content: The file's own bytes, not re-encoded.
    """

    name: str
    content: bytes

    def __repr__(self) -> str:
        return f"{self.name!r} of {len(self.content)} bytes"


@dataclass(frozen=True, kw_only=True)
class Record:
    """A row: one image, or as many as the schema has columns for, with all entries about it.

    Attributes:
        image_id: Unique within the split.
        images: In the order of the schema's columns.
        entries: One or more.
        extra: Values of the further columns.
    """

    image_id: str
    images: Sequence[ImageFile]
    entries: Sequence[Any]
    extra: Mapping[str, object] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of the images."""
        return sum(len(image.content) for image in self.images)

    def row(self, schema: Schema) -> dict[str, object]:
        """Values of the columns."""
        images = zip(schema.image_columns, self.images, strict=bool(self.images))
        entries = [entry if isinstance(entry, str) else vars(entry) for entry in self.entries]
        return {
            **dict.fromkeys(schema.image_columns),
            **{column: {"bytes": image.content, "path": image.name} for column, image in images},
            **{"image_id": self.image_id, schema.entries: entries},
            **self.extra,
        }


def write_split(
    path: Path,
    records: Iterable[Record],
    *,
    schema: Schema = CAPTIONS,
    columns: Mapping[str, Any] | None = None,
    row_group_bytes: int = 2**20,
    before: Callable[[SplitInfo], None] | None = None,
    may_be_empty: bool = False,
) -> SplitInfo:
    """Writes `records` to one Parquet file, atomically, holding one row group in memory at a time.

    Args:
        path: The file to write; replaced if it exists.
        records: The rows, read once.
        schema: What the rows hold.
        columns: Type of each further column, such as `str` or `tuple[str, ...]`; the
            records' `extra` must have exactly these.
        row_group_bytes: Image bytes after which a row group is closed; all of a group are read to get one of them.
        before: Called with what the file holds before it gets its name.
        may_be_empty: Whether no record is no error.

    Returns:
        Counts and digest of the file.

    Raises:
        ValueError: If there is no record, an image_id comes twice, or a record does not fit the schema or the columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, further = Path(path), columns or {}
    arrow_schema = schema.arrow_schema(further)
    arrow_schema = arrow_schema.with_metadata({**arrow_schema.metadata, _MARK: str(FORMAT).encode()})
    num_images = num_texts = 0
    with replacing(path) as temporary:
        # A dictionary and statistics of images cost much to read and are of no use.
        options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
        with pq.ParquetWriter(temporary, arrow_schema, **options) as writer:
            for group in _grouped(_checked(records, schema, further), row_group_bytes):
                num_images += len(group)
                num_texts += sum(len(record.entries) for record in group)
                rows = [record.row(schema) for record in group]
                writer.write_table(pa.Table.from_pylist(rows, schema=arrow_schema))
        if not num_images and not may_be_empty:
            raise ValueError(f"no record to write to {path}; a split needs at least one image, or no file at all")
        info = SplitInfo(images=num_images, texts=num_texts, files={path.name: sha256_of(temporary)})
        if before:
            before(info)
    return info


def is_own_parquet(path: Path) -> bool:
    """Whether `path` was written by `write_split` and may be replaced."""
    try:
        return _MARK in (read_schema(Path(path)).metadata or {})
    except ValueError:  # no Parquet file, in spite of its name
        return False


def _checked(records: Iterable[Record], schema: Schema, further: Mapping[str, Any]) -> Iterator[Record]:
    """Yields the records, each of which must fit and have an id of its own."""
    seen: set[str] = set()
    for record in records:
        if problem := _problem_of(record, schema, seen, further):
            raise ValueError(problem)
        seen.add(record.image_id)
        yield record


def _problem_of(record: Record, schema: Schema, seen: set[str], further: Mapping[str, Any]) -> str | None:
    name = f"record {record.image_id!r}"
    if not record.image_id:
        return f"record of {record.images} has an empty image_id; give it a unique name"
    if record.image_id in seen:
        return f"image_id {record.image_id!r} comes twice; ids must be unique"
    if len(record.images) != len(schema.image_columns) and (record.images or not schema.optional):
        return f"{name} has {len(record.images)} images, expected {len(schema.image_columns)}"
    for image in record.images:
        if not image.content:
            return f"image {image.name!r} of {name} has 0 bytes; give the file's content"
    if not record.entries:
        return f"{schema.entries} of {name} are missing; give at least one"
    for problem in filter(None, map(schema.problem_of, record.entries)):
        return f"{schema.entries} of {name}: {problem}; leave it out"
    if record.extra.keys() != further.keys():
        return f"{name} has columns {sorted(record.extra)}, expected {sorted(further)}"
    return None


def _grouped(records: Iterable[Record], group_bytes: int) -> Iterator[list[Record]]:
    group: list[Record] = []
    size = 0
    for record in records:
        group.append(record)
        size += record.size
        if size >= group_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group
