"""Images of the index and what it has: `GET /v1/pictures/{id}` and `/v1/index`."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import stat
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi import Path as InPath
from PIL import Image
from pydantic import BaseModel, Field
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from bridgetower.processor import media_type, open_reduced
from bridgetower.search.table import Indexed
from bridgetower.serve.errors import ApiError
from bridgetower.serve.schemas import errors, json_of
from bridgetower.serve.service import MIB, Served, Service

router = APIRouter(tags=["search"])

MAX_SIDE = 1600
"""Pixels of the longer side that an image is made small to, at most."""

_EXAMPLES = 12
_QUALITY = 88  # of a JPEG
_WHITE = (255, 255, 255)  # under transparent pixels
_CHUNK = 2**16
_HEADERS = {
    "Cache-Control": "private, max-age=86400",  # an id names one content for ever
    "Content-Disposition": "inline",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Vary": "Authorization",
    "X-Content-Type-Options": "nosniff",
}

Id = Annotated[str, InPath(pattern="^[0-9a-f]{64}$", description="As a hit of `/v1/search` has it.")]
Size = Annotated[
    int | None,
    Query(
        ge=16,
        le=MAX_SIDE,
        description="Longer side of the JPEG that is made of it, in pixels; none: the file itself.",
    ),
]


class Example(BaseModel):
    """An image of the index."""

    id: str
    path: str = Field(description="As the index has it.")
    width: int
    height: int
    captions: list[str]


class IndexResponse(BaseModel):
    """What can be searched."""

    images: int = Field(description="How many there are.")
    examples: list[Example] = Field(description="Some of them, from all over the index.")


@router.get("/v1/index", response_model=IndexResponse, responses=errors(401))
async def index(service: Served) -> Response:
    """Say how many images can be searched, and show some."""
    count, examples = await asyncio.to_thread(lambda: (len(service.index), service.index.examples(_EXAMPLES)))
    shown = [
        Example(id=one.digest, path=one.path, width=one.width, height=one.height, captions=list(one.captions))
        for one in examples
    ]
    return json_of(IndexResponse(images=count, examples=shown))


@router.get(
    "/v1/pictures/{id}",
    response_class=Response,
    responses={200: {"content": {"image/*": {}}}, **errors(400, 401, 404, 413, 429, 503)},
)
async def picture(id: Id, service: Served, size: Size = None) -> Response:  # noqa: A002 - its name in the path
    """Return an image of the index: small as JPEG, or as the file that was indexed."""
    with service.admission(1, "id", None):
        copies = await asyncio.to_thread(service.index.with_digest, id)
        if size is None:
            return _Original(copies, service)
        content = await service.inputs.in_thread(lambda: _small(_content(service, copies), size, service.max_pixels))
    return Response(content, media_type="image/jpeg", headers=_HEADERS)


class _Original(Response):
    """Sends the file of an image. Few are in memory at once, however slowly they are taken."""

    def __init__(self, copies: Sequence[Indexed], service: Service) -> None:
        super().__init__()
        self._copies, self._service = copies, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reads the file once it is its turn, and sends it."""
        async with self._service.originals:
            content, kind = await self._service.inputs.in_thread(self._read)
            headers = {**_HEADERS, "Content-Length": str(len(content))}
            await StreamingResponse(_parts(content), media_type=kind, headers=headers)(scope, receive, send)

    def _read(self) -> tuple[bytes, str]:
        content = _content(self._service, self._copies)
        try:
            return content, media_type(content)
        except ValueError as error:
            raise _gone(str(error)) from error


async def _parts(content: bytes) -> AsyncIterator[bytes]:
    """Yields parts that the connection takes one after the other, so that what was not taken is not kept there too."""
    for start in range(0, len(content), _CHUNK):
        yield content[start : start + _CHUNK]


def _content(service: Service, copies: Sequence[Indexed]) -> bytes:
    """Returns the file of an image that has copies in the index.

    Raises:
        ApiError: None of them is there as it was indexed.
    """
    problem = "the index has no image with this id"
    for one in copies:
        try:
            return indexed_content(service.index.root, one, max_bytes=service.config.max_body * MIB)
        except OSError as error:
            problem = f"the image cannot be read ({error.strerror})"
        except ValueError as error:
            problem = str(error)
    raise _gone(problem)


def indexed_content(root: Path, image: Indexed, *, max_bytes: int) -> bytes:
    """Returns the bytes of an image that was indexed, and no others: their digest is compared.

    Args:
        root: Folder that the index is of.
        image: What the index has.
        max_bytes: Of a file.

    Raises:
        ValueError: The file is outside the folder, is none, is too large, or is not what was indexed.
        OSError: It cannot be read.
    """
    file = Path(os.path.realpath(root / image.path, strict=True))  # Path.resolve fails otherwise on links in a circle
    if not file.is_relative_to(root.resolve()):
        raise ValueError("the image is outside the folder of the index")
    if image.size > max_bytes:
        raise ValueError(f"the file of the image has {image.size} bytes, the limit is {max_bytes}")
    # Opened so, a pipe does not wait for somebody to write into it.
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
        found = os.fstat(stream.fileno())
        content = stream.read(image.size) if stat.S_ISREG(found.st_mode) and found.st_size == image.size else b""
    if hashlib.sha256(content).hexdigest() != image.digest:
        raise ValueError("the image has changed since it was indexed; bring the index up to date")
    return content


def _small(content: bytes, size: int, max_pixels: int) -> bytes:
    """Returns an image as JPEG, no larger than a number of pixels on its longer side."""
    try:
        image, _ = open_reduced(content, size, max_pixels=max_pixels, background=_WHITE)
    except ValueError as error:
        raise _gone(str(error).partition("; shrink it first")[0]) from error
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY, subsampling=0)
    return stream.getvalue()


def _gone(message: str) -> ApiError:
    return ApiError(404, message, param="id", code="no_picture")
