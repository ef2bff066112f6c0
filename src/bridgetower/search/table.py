"""What an index is: where it is, its columns, its rows as Arrow tables."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa
from jaxtyping import Float
from torch import Tensor

from bridgetower.bulk.lance import Uri
from bridgetower.data.images import ImageRef
from bridgetower.data.remote import is_url
from bridgetower.files import json_object, parse_json
from bridgetower.model.plain import from_plain
from bridgetower.processor import check_length

VectorColumn = Literal["image_vector", "text_vectors", "pair_vectors"]

ABOUT = ("path", "size", "mtime", "width", "height", "captions", "start", "end")
"""Columns of a result, and of conditions."""

_OF_MOMENTS = {"start": pa.float64(), "end": pa.float64(), "frame": pa.large_binary()}  # null of images
_MARK = b"bridgetower"  # key of the schema's metadata
_VERSION = 3
_WITHIN = ("piece", "cell", "moment")  # where an image is in a file
_CHANGED = "the {} has changed since it was indexed; bring the index up to date"
_BESIDE = "./"  # begins paths that are relative to the folder that the index is in


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """What an index is of.

    Attributes:
        fingerprint: Of the model that made the vectors.
        model: Where that model was loaded from; a path within the index's folder is relative to it.
        root: Folder that the images' paths start from, likewise.
    """

    fingerprint: str
    model: str
    root: str


@dataclass(frozen=True, kw_only=True)
class SourceImage:
    """An image as its source names it.

    Attributes:
        path: From the source's folder, or what else names it.
        size: Of the image file, in bytes; 0 where the source does not tell.
        mtime: Of the file that it is in, in microseconds since 1970, within the years 1 to 9999; 0 at a URL.
        captions: Stripped, none empty.
        place: Where in a shard or a table, or at which URL; empty of a file of its own. LangChain's vector store also
            keeps metadata in it.
    """

    path: str
    size: int
    mtime: int
    captions: tuple[str, ...] = ()
    place: str = ""


@dataclass(frozen=True, kw_only=True)
class IndexedRow:
    """An image with its vectors, to be written.

    Attributes:
        source: As its source names it.
        digest: SHA-256 of the file.
        width: Of the upright image, in pixels.
        height: Of the same.
        frame: The file itself if it was made of a frame of a video.
        image_vector: Contrastive; of a text without an image, the text's.
        text_vectors: Contrastive, one per caption.
        pair_vectors: Joint, one per caption.
    """

    source: SourceImage
    digest: str
    width: int
    height: int
    frame: bytes | None = None
    image_vector: Float[Tensor, " c"]
    text_vectors: Float[Tensor, "t c"]
    pair_vectors: Float[Tensor, "t e"]

    @property
    def is_finite(self) -> bool:
        """Whether all values of the vectors are numbers."""
        return all(bool(one.isfinite().all()) for one in (self.image_vector, self.text_vectors, self.pair_vectors))


@dataclass(frozen=True, kw_only=True)
class Indexed:
    """An image as the index has it.

    Attributes:
        digest: SHA-256 of the file.
        path: From the folder of the images.
        size: Of the file, in bytes.
        width: Of the upright image, in pixels.
        height: Of the same.
        captions: That came with it.
        place: Where in a shard, a table or a video, or at which URL; empty of a file of its own.
        start: Seconds from the start of the video that it is a moment of; None: it is none.
        end: Likewise.
    """

    digest: str
    path: str
    size: int
    width: int
    height: int
    captions: Sequence[str]
    place: str = ""
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, kw_only=True)
class Hit(Indexed):
    """An image that was found.

    Attributes:
        file: The image, or the shard, table or video that it is in, or its URL.
        cosine: Of the query's vector and the image's.
        probability: That text and image match; None where they were not matched, or matching has no calibration.
        score: Of the matching head, from 0 to 1, where it has no calibration; else None.
    """

    file: Path | str
    cosine: float
    probability: float | None = None
    score: float | None = None


def schema_of(info: IndexInfo, image_width: int, pair_width: int) -> pa.Schema:
    """Returns the columns of an index, for vectors of these widths, with what it is of as metadata."""
    image, pair = (pa.list_(pa.float32(), width) for width in (image_width, pair_width))
    fields = {
        "path": pa.string(),
        "size": pa.int64(),
        "mtime": pa.timestamp("us", tz="UTC"),
        "digest": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "captions": pa.list_(pa.field("item", pa.string(), nullable=False)),
        "place": pa.string(),
        **_OF_MOMENTS,
        "image_vector": image,
        "text_vectors": pa.list_(image),
        "pair_vectors": pa.list_(pair),
    }
    content = {"version": _VERSION, **asdict(info)}
    return pa.schema(
        [pa.field(name, kind, nullable=name in _OF_MOMENTS) for name, kind in fields.items()],
        metadata={_MARK: json.dumps(content).encode()},
    )


def info_of(uri: Uri, schema: pa.Schema) -> IndexInfo:
    """Reads what an index is of.

    Raises:
        ValueError: It is no index, or one of another release.
    """
    content = parse_json((schema.metadata or {}).get(_MARK, b"{}"), f"what {uri} is of")
    if not isinstance(content, dict) or content.pop("version", None) != _VERSION:
        raise ValueError(f"{uri} is no index of this release; choose another name, or make it again")
    return from_plain(IndexInfo, content, f"what {uri} is of")


def check_columns(uri: Uri, schema: pa.Schema, info: IndexInfo) -> None:
    """Checks that a table has the columns of an index, of any widths of vectors, and no others.

    Raises:
        ValueError: It has others.
    """

    def width(name: str) -> int:
        kind = schema.field(name).type if name in schema.names else pa.null()
        kind = kind.value_type if pa.types.is_list(kind) else kind
        return int(kind.list_size) if pa.types.is_fixed_size_list(kind) else 1

    if not schema.equals(schema_of(info, width("image_vector"), width("pair_vectors"))):
        raise ValueError(f"{uri} has other columns than an index; choose another name, or make it again")


def place_of(image: ImageRef, root: Path) -> str:
    """Returns where an image is in a shard, a table or a video, or at which URL, as JSON; empty of a file."""
    if image.is_file:
        return ""
    file = {"url": image.url} if image.url else {"file": os.path.relpath(image.path, root)}
    return json.dumps(file | {name: list(where) for name in _WITHIN if (where := getattr(image, name))})


def file_of(image: Indexed, root: Path) -> Path | str:
    """Returns where an image is: its file, the shard, table or video that it is in, or its URL.

    Raises:
        ValueError: The index has something else in its place.
    """
    where = _place(image)
    return str(where["url"]) if "url" in where else root / where.get("file", image.path)


def _place(image: Indexed) -> dict[str, Any]:
    """Returns what `place_of` wrote; the index may be from someone else, so its types are checked."""
    where = json_object(image.place or "{}", "the place of an image")
    piece, cell = where.get("piece", [0, 1]), where.get("cell", ["", 0])
    if not (
        all(isinstance(where.get(name, ""), str) for name in ("file", "url"))
        and (_are(piece, int, int) and piece[0] >= 0 and piece[1] > 0)
        and (_are(cell, str, int) and cell[1] >= 0)
    ):
        raise ValueError(f"the index has {image.place} as the place of {image.path!r}; make the index again")
    return where


def _are(values: Any, *kinds: type) -> bool:
    """Whether values are a list of one of each kind."""
    return isinstance(values, list) and [type(value) for value in values] == list(kinds)


def read_indexed(file: Path | str, image: Indexed) -> bytes:
    """Returns the bytes of an image if they are those that were indexed: their digest is compared.

    Args:
        file: From `file_of`.
        image: What the index has.

    Raises:
        ValueError: They are others.
        OSError: They cannot be read.
    """
    content = _inside(file, image) if image.place else _whole(Path(file), image)
    if hashlib.sha256(content).hexdigest() != image.digest:
        raise ValueError(_CHANGED.format("image"))
    return content


def _inside(file: Path | str, image: Indexed) -> bytes:
    """Returns an image in a shard or a table, or at a URL."""
    where = _place(image)
    piece, cell = (tuple(where[name]) if name in where else None for name in ("piece", "cell"))
    if piece and piece[1] != image.size:  # which limits are for
        raise ValueError(f"the index has {image.size} bytes, and {piece[1]} as the length of the image; make it again")
    check_length(image.path, image.size)
    if "url" not in where:
        _regular(Path(file)).close()
    return ImageRef(
        path=Path(file), name=image.path, file_name=image.path, piece=piece, cell=cell, url=where.get("url")
    ).read()


def _whole(file: Path, image: Indexed) -> bytes:
    """Returns the content of a file if it has the length that was indexed."""
    with _regular(file) as stream:
        return stream.read(image.size) if os.fstat(stream.fileno()).st_size == image.size else b""


def _regular(file: Path, what: str = "image") -> BinaryIO:
    """Opens a regular file, without waiting for the writer of a pipe."""
    stream = os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise ValueError(_CHANGED.format(what))
    return stream


def open_unchanged(file: Path, size: int, mtime: int | None) -> BinaryIO:
    """Opens a file if its size, in bytes, and its time, in microseconds since 1970, are those that were indexed.

    Raises:
        ValueError: They are others, or it is no file.
        OSError: It cannot be opened.
    """
    stream = _regular(file, "video")
    status = os.fstat(stream.fileno())
    if (status.st_size, status.st_mtime_ns // 1000) != (size, mtime):
        stream.close()
        raise ValueError(_CHANGED.format("video"))
    return stream


def table_of(rows: Sequence[IndexedRow], schema: pa.Schema) -> pa.Table:
    """Returns rows as an Arrow table."""
    captions = pa.array([list(row.source.captions) for row in rows], schema.field("captions").type)
    columns = {
        "path": pa.array([row.source.path for row in rows]),
        "size": pa.array([row.source.size for row in rows]),
        "mtime": pa.array([row.source.mtime for row in rows], pa.int64()).cast(pa.timestamp("us", tz="UTC")),
        "digest": pa.array([row.digest for row in rows]),
        "width": pa.array([row.width for row in rows], pa.int32()),
        "height": pa.array([row.height for row in rows], pa.int32()),
        "captions": captions,
        "place": pa.array([row.source.place for row in rows]),
        **{name: pa.array([_moment_of(row)[name] for row in rows], kind) for name, kind in _OF_MOMENTS.items()},
        "image_vector": pa.array([row.image_vector.numpy() for row in rows], schema.field("image_vector").type),
    }
    for name in ("text_vectors", "pair_vectors"):
        lists = [list(getattr(row, name).numpy()) for row in rows]
        columns[name] = pa.array(lists, schema.field(name).type)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _moment_of(row: IndexedRow) -> dict[str, float | bytes | None]:
    """Returns the columns that only moments of videos have."""
    start, end = json_object(row.source.place or "{}", "the place of an image").get("moment", (None, None))
    return {"start": start, "end": end, "frame": row.frame}


def is_one_of(values: Collection[str], column: str = "path") -> str:
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


def is_path(path: str) -> bool:
    """Whether what `portable` returned is a path, and not the hub id that was kept instead of one."""
    return path.startswith(_BESIDE) or Path(path).is_absolute()


def resolved(uri: Uri, path: str) -> str:
    """Undoes `portable`; absolute paths and hub ids stay."""
    return str(Path(uri).parent / path) if path.startswith(_BESIDE) else path
