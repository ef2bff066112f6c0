"""The bytes of what was indexed, and no others: their digest, or size and time, are compared."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from bridgetower.bulk.lance_errors import reading
from bridgetower.search.table import Indexed, file_of, is_one_of, open_unchanged, read_indexed


def content_of(image: Indexed, root: Path, *, within_root: bool, fetch: bool, max_bytes: int | None) -> bytes:
    """Returns the bytes of an image that is no moment; see `Index.content`."""
    named = file_of(image, root)
    if isinstance(named, str):
        if not fetch:
            raise ValueError("the image is at a URL, which is not fetched because an index names it")
        return read_indexed(named, image)
    file = _real(named, root, within_root=within_root)
    if max_bytes is not None and image.size > max_bytes:
        raise ValueError(f"the file of the image has {image.size} bytes, the limit is {max_bytes}")
    return read_indexed(file, image)


def checked_frame(moment: Indexed, frame: bytes | None, max_bytes: int | None) -> bytes:
    """Returns the frame of a moment if it is the one that was indexed."""
    if max_bytes is not None and len(frame or b"") > max_bytes:
        raise ValueError(f"the file of the image has {len(frame or b'')} bytes, the limit is {max_bytes}")
    if frame is None or hashlib.sha256(frame).hexdigest() != moment.digest:
        raise ValueError("the moment has changed since it was indexed; search again")
    return frame


def open_video(table: Any, uri: str, moment: Indexed, root: Path) -> BinaryIO:
    """Opens the video of a moment; see `Index.open_video`."""
    if moment.start is None or isinstance(named := file_of(moment, root), str):
        raise ValueError("it is an image, not a moment of a video")
    with reading(uri):
        rows = table.search().where(is_one_of([moment.path])).select(["mtime"]).to_arrow()
    (mtime,) = rows["mtime"].cast(pa.int64()).to_pylist() or [None]
    return open_unchanged(_real(named, root, within_root=True), moment.size, mtime)


def _real(named: Path, root: Path, *, within_root: bool) -> Path:
    file = Path(os.path.realpath(named, strict=True))  # Path.resolve fails on links in a circle
    if within_root and not file.is_relative_to(root.resolve()):
        raise ValueError("the file is outside the folder of the index")
    return file
