"""Images of the index and what it has: `GET /v1/pictures/{id}` and `/v1/index`."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi import Path as InPath
from PIL import Image
from pydantic import BaseModel, Field

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
            return await service.inputs.in_thread(lambda: _original(service, copies))
        content = await service.inputs.in_thread(lambda: _small(_content(service, copies), size, service.max_pixels))
    return Response(content, media_type="image/jpeg", headers=_HEADERS)


def _original(service: Service, copies: Sequence[Indexed]) -> Response:
    """Returns the file of an image as it is."""
    content = _content(service, copies)
    try:
        return Response(content, media_type=media_type(content), headers=_HEADERS)
    except ValueError as error:
        raise _gone(str(error)) from error


def _content(service: Service, copies: Sequence[Indexed]) -> bytes:
    """Returns the file of an image that has copies in the index.

    Raises:
        ApiError: None of them is there as it was indexed.
    """
    problem = "the index has no image with this id"
    for one in copies:
        try:
            return service.index.content(one, within_root=True, max_bytes=service.config.max_body * MIB)
        except OSError as error:
            problem = f"the image cannot be read ({error.strerror})"
        except ValueError as error:
            problem = str(error)
    raise _gone(problem)


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
