"""Videos of the index: `GET /v1/videos/{id}` sends pieces of them, which players ask for."""

from __future__ import annotations

import asyncio
import logging
import mimetypes
import os
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from typing import BinaryIO

from fastapi import APIRouter, Header, Response
from fastapi.responses import StreamingResponse

from bridgetower.search.index import Index
from bridgetower.search.table import Indexed
from bridgetower.serve.errors import ApiError
from bridgetower.serve.schemas import JsonRoute, errors
from bridgetower.serve.search import HEADERS, Id, index_read
from bridgetower.serve.service import Served

router = APIRouter(route_class=JsonRoute, tags=["search"])

PIECE = 2**21
"""Most bytes of an answer to a request for a range; players ask for the next one."""

logger = logging.getLogger(__name__)

_CHUNK = 2**16  # bytes of a whole video that are read at once
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII | re.IGNORECASE)


@router.get(
    "/v1/videos/{id}",
    response_class=Response,
    responses={200: {"content": {"video/*": {}}}, 206: {}, 416: {}, **errors(400, 401, 404, 429, 503)},
)
async def video(
    id: Id,  # noqa: A002 - its name in the path
    service: Served,
    range: str | None = Header(None, description="One range of bytes; others are ignored."),  # noqa: A002 - its name in the headers
    if_none_match: str | None = Header(None, description="The `ETag` of what the client has."),
    if_range: str | None = Header(None, description="The `ETag` that the range is of."),
) -> Response:
    """Return the video of a moment, or a piece of at most 2 MiB of it if a range is asked for."""
    with service.admission(1, "id", None):
        with index_read():
            moments = await asyncio.to_thread(service.index.with_digest, id)
        stream, name = await asyncio.to_thread(_opened, service.index, moments)
    status = os.fstat(stream.fileno())
    size, tag = status.st_size, f'"{status.st_size:x}-{status.st_mtime_ns:x}"'
    kind = mimetypes.guess_type(name)[0] or ""
    kind = kind if kind.startswith("video/") else "application/octet-stream"
    headers = {**HEADERS, "Accept-Ranges": "bytes", "Cache-Control": "private, no-cache", "ETag": tag}
    with ExitStack() as opened:
        opened.enter_context(stream)
        if if_none_match is not None and {"*", tag} & {one.strip() for one in if_none_match.split(",")}:
            return Response(status_code=304, headers=headers)
        piece = None if range is None or if_range not in (None, tag) else _piece(range, size)
        if piece is None:
            opened.pop_all()  # `_whole` closes it
            headers["Content-Length"] = str(size)
            return StreamingResponse(_whole(stream), media_type=kind, headers=headers)
        start, end = piece
        content = await asyncio.to_thread(os.pread, stream.fileno(), end - start, start)
    headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{size}"
    return Response(content, 206, media_type=kind, headers=headers)


def _opened(index: Index, moments: Sequence[Indexed]) -> tuple[BinaryIO, str]:
    """Opens the video of the first moment that has one, with its name."""
    problem = "the index has no moment of a video with this id"
    for one in moments:
        try:
            return index.open_video(one), one.path.rpartition("#")[0]
        except (OSError, ValueError) as error:
            logger.error("video %s: %s", one.digest, error)
            problem = "the video cannot be read as it was indexed; the server's log has the reason"
    raise ApiError(404, problem, param="id", code="no_video")


def _piece(given: str, size: int) -> tuple[int, int] | None:
    """Returns where a range begins and ends, cut to `PIECE` bytes; None of all but one valid range, which is ignored.

    Source: RFC 9110, section 14.2.
    """
    found = _RANGE.fullmatch(given.strip())
    first, last = found.groups() if found else ("", "")
    if not (first or last) or (first and last and int(last) < int(first)):
        return None
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1 if first and last else size)
    if start >= end:
        message = f"the range is {given[:80]!r}; expected one like bytes=0-999 within {size} bytes"
        raise ApiError(416, message, param="range", headers={"Content-Range": f"bytes */{size}"})
    return start, min(end, start + PIECE)


async def _whole(stream: BinaryIO) -> AsyncIterator[bytes]:
    with stream:
        while content := await asyncio.to_thread(stream.read, _CHUNK):
            yield content
