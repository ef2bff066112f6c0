"""The index: `POST /v1/search` in two stages as `bridgetower search`, `GET /v1/index`, its images, pieces of videos."""

from __future__ import annotations

import asyncio
import io
import logging
import mimetypes
import os
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from hashlib import sha256
from typing import Annotated, Any, BinaryIO

import torch
from fastapi import APIRouter, Header, Query, Response
from fastapi import Path as InPath
from fastapi.responses import StreamingResponse
from PIL import Image
from pydantic import BaseModel, Field, field_validator

from bridgetower.inference import Item, Tokens
from bridgetower.processor import Resized, media_type
from bridgetower.search.conditions import condition_sql
from bridgetower.search.index import Hit, Index, Indexed
from bridgetower.search.searcher import COLUMNS, RERANK, Against, Searcher, candidates, mean_vector, two_stages
from bridgetower.serve.access import video_token
from bridgetower.serve.config import ServeConfig
from bridgetower.serve.errors import ApiError
from bridgetower.serve.schemas import (
    COMPUTING,
    PROBABILITY,
    SCORE,
    Body,
    JsonRoute,
    Listed,
    Source,
    Text,
    Top,
    Usage,
    errors,
    json_of,
)
from bridgetower.serve.service import MIB, Served, Service, embedding_items

router = APIRouter(route_class=JsonRoute, tags=["search"])
logger = logging.getLogger(__name__)

MAX_SIDE = 1600
"""Most pixels of the longer side of a reduced image."""

PIECE = 2**21
"""Most bytes of an answer to a request for a range; players ask for the next one."""

_CHUNK = 2**16  # bytes of a whole video that are read at once
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII | re.IGNORECASE)
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


_EXAMPLE = {"query": "a red flag", "top": 3, "rerank": 8, "where": {"width": {"gte": 8}}}


class SearchRequest(Body, json_schema_extra={"examples": [_EXAMPLE]}):
    """A text, an image or both, and which images to search."""

    query: Text | None = Field(None, description="Description of the images to find.")
    image: Source | None = Field(None, description="An image, as elsewhere; similar images are found.")
    top: Top = 10
    rerank: int | None = Field(
        None,
        ge=0,
        le=256,
        description=f"Candidates matched with the text; if left out {RERANK}, or what the limit of items leaves; 0 "
        "where validation did not find that matching ranks better, and for what is said.",
    )
    where: dict[str, Any] | None = Field(
        None,
        description='Condition on path, size, mtime, width, height, captions, start and end, such as {"width": {"gte": '
        '800}, "path": {"like": "%.jpg"}}. Operators are eq, ne, gt, gte, lt, lte, in, like (of path) and contains (of '
        'captions); {"and": […]}, {"or": […]} and {"not": {…}} combine conditions.',
    )
    against: Against | None = Field(
        None,
        description="What the query is compared with; if left out images, and for a text alone what is said, where all "
        "of the index are moments of videos with words.",
    )
    exact: bool = Field(False, description="Compare with every vector, even where the index could leave most out.")

    @field_validator("where")
    @classmethod
    def _is_condition(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        if given is not None:
            condition_sql(given)
        return given


class IndexedImage(BaseModel):
    """An image of the index."""

    id: str = Field(description="For `/v1/pictures/{id}`: SHA-256 of the file when it was indexed.")
    path: str = Field(description="As the index has it.")
    width: int
    height: int
    captions: list[str]
    start: float | None = Field(None, description="Of a moment of a video: seconds from its start.")
    end: float | None = Field(None, description="Likewise.")


class FoundImage(IndexedImage):
    """An image that was found."""

    rank: int
    cosine: float = Field(description="Of the query's vector and the image's.")
    probability: float | None = PROBABILITY
    score: float | None = SCORE
    transcript: str | None = Field(None, description="What is said in a moment of a video.")
    link: str | None = Field(
        None, description="Where a moment of a video plays, with its times: on this server, or at the video's URL."
    )


class SearchResponse(Listed[FoundImage]):
    """Images: what was matched first, by log-odds of a match + the model's weight · cosine, then the nearest."""

    against: Against = Field(
        description="What the query was compared with: as asked, unless the model's vectors of pairs cannot be "
        "compared with a text or an image alone."
    )


@router.post("/v1/search", response_model=SearchResponse, responses=COMPUTING)
async def search(body: SearchRequest, service: Served) -> Response:
    """Find images of the index by a text, by an image, or by both."""
    searcher = service.searcher
    assert searcher is not None, "searches are there only with an index"
    settings = {"top": body.top, "rerank": body.rerank, "against": body.against}
    try:
        with _index_read():
            against, rerank = await asyncio.to_thread(searcher.planned, body.query, body.image, **settings)  # type: ignore[arg-type]
            rerank = min(rerank, await asyncio.to_thread(len, searcher.index))
    except ValueError as error:
        raise ApiError(400, str(error)) from error
    given = sum(part is not None for part in (body.query, body.image))
    if body.rerank is None:
        rerank = max(0, min(rerank, service.config.max_items - given))
    with service.admission(given + rerank, "rerank", body.model, images=[body.image]):
        hits, tokens = await _found(body, service, searcher, rerank, against)
    data = [FoundImage(rank=rank, **_told(hit, service.config), **vars(hit)) for rank, hit in enumerate(hits, start=1)]
    return json_of(SearchResponse(data=data, model=service.name, against=against, usage=Usage.of(tokens)))


def _told(hit: Hit, config: ServeConfig) -> dict[str, Any]:
    """Returns what only a hit over HTTP has, and what only a moment of a video has."""
    if hit.start is None:
        return {"id": hit.digest}
    token = "" if config.api_key is None else f"?token={video_token(config.api_key, hit.digest)}"
    place = hit.file if isinstance(hit.file, str) else f"{config.root_path}/v1/videos/{hit.digest}{token}"
    link = f"{place}#{hit.path.rpartition('#')[2]}"
    return {"id": hit.digest, "transcript": " ".join(hit.captions), "link": link}


async def _found(
    body: SearchRequest, service: Service, searcher: Searcher, rerank: int, against: Against
) -> tuple[list[Hit], int]:
    """As `Searcher.search`, but computed in the batches of all requests."""
    images = [] if body.image is None else await service.inputs.images([body.image], "image")
    texts = [] if body.query is None else await service.inputs.texts([body.query], "query", truncate=body.truncate)
    items = embedding_items(images, texts, joint=against == "pairs" and bool(images and texts))
    vector = mean_vector(torch.stack(await service.batcher.submit(items)))
    try:
        with _index_read():
            nearest = await asyncio.to_thread(
                searcher.index.nearest,
                vector,
                max(body.top, rerank),
                column=COLUMNS[against],
                where=None if body.where is None else condition_sql(body.where),
                exact=body.exact,
            )
    except ValueError as error:
        if body.where is None:
            raise _unavailable(error) from error
        raise ApiError(400, str(error), param="where") from error
    chosen, others = candidates(nearest, rerank)
    matched, log_odds = await _matched(service, searcher, chosen, texts)
    reranking = searcher.predictor.reranking
    ranked = two_stages([one for one, _ in matched], log_odds, others, reranking)[: body.top]
    tokens = service.main.tokens([*images, *(image for _, image in matched)], texts)
    return ranked, tokens


@contextmanager
def _index_read() -> Iterator[None]:
    """Answers that the index is unavailable where it cannot be read in the block; the log has the reason."""
    try:
        yield
    except OSError as error:
        raise _unavailable(error) from error


def _unavailable(error: Exception) -> ApiError:
    logger.error("index: %s", error)
    return ApiError(503, "the index cannot be read; the server's log has the reason", code="index_unavailable")


async def _matched(
    service: Service, searcher: Searcher, found: list[Hit], texts: list[Tokens]
) -> tuple[list[tuple[Hit, Resized]], list[float]]:
    """Returns candidates with their images, and the log-odds of a match of each."""
    if not found:
        return [], []
    try:
        with _index_read():
            frames = await asyncio.to_thread(searcher.index.frames, found)
        limit = service.config.max_body * MIB
        settings: Any = {"prepare": service.inputs.prepared, "max_bytes": limit, "fetch": False, "frames": frames}
        images = await service.inputs.each([partial(searcher.open, one, **settings) for one in found])
        opened = searcher.usable(found, images)
    except ValueError as error:
        logger.error("search: %s", error)
        message = "none of the images that were found can be opened where the index has them; send rerank 0"
        raise ApiError(404, message, code="no_pictures") from error
    items = [Item(kind="match", image=image.pixels, ids=texts[0]) for _, image in opened]
    log_odds: list[float] = await service.batcher.submit(items)
    return opened, log_odds


class IndexResponse(BaseModel):
    """What can be searched."""

    images: int = Field(description="How many there are.")
    examples: list[IndexedImage] = Field(description="Some of them, from all over the index.")


@router.get("/v1/index", response_model=IndexResponse, responses=errors(401, 503))
async def index(service: Served) -> Response:
    """Return the number of images in the index, and some of them."""
    with _index_read():
        count, examples = await asyncio.to_thread(lambda: (len(service.index), service.index.examples(_EXAMPLES)))
    shown = [IndexedImage(id=one.digest, **vars(one)) for one in examples]
    return json_of(IndexResponse(images=count, examples=shown))


@router.get(
    "/v1/pictures/{id}",
    response_class=Response,
    responses={200: {"content": {"image/*": {}}}, **errors(400, 401, 404, 413, 429, 503)},
)
async def image(
    id: Id,  # noqa: A002 - its name in the path
    service: Served,
    size: Size = None,
    if_none_match: str | None = Header(None, description="The `ETag` of what the client has."),
) -> Response:
    """Return an image of the index: small as JPEG, or as the file that was indexed."""
    headers = {**_HEADERS, "ETag": (tag := f'"{id}-{size or "file"}"')}
    with service.admission(1, "id", None):
        with _index_read():
            copies = await asyncio.to_thread(service.index.with_digest, id)
        if copies and tag in (if_none_match or ""):
            return Response(status_code=304, headers=headers)
        if size is None:
            return await service.inputs.in_thread(lambda: _original(service, copies, headers))
        content = await service.inputs.in_thread(lambda: _small(service, _content(service, copies), size))
    return Response(content, media_type="image/jpeg", headers=headers)


def _original(service: Service, copies: Sequence[Indexed], headers: Mapping[str, str]) -> Response:
    """Returns the file of an image as it is."""
    content = _content(service, copies)
    try:
        return Response(content, media_type=media_type(content), headers=headers)
    except ValueError as error:
        raise _gone(str(error)) from error


def _content(service: Service, copies: Sequence[Indexed]) -> bytes:
    """Returns the file of an image that has copies in the index."""
    problem = "the index has no image with this id"
    for one in copies:
        try:
            limit = service.config.max_body * MIB
            content = service.index.content(one, within_root=True, fetch=False, max_bytes=limit)
            if one.start is not None and (len(content) > limit or sha256(content).hexdigest() != one.digest):
                raise ValueError(f"the frame of {one.path} has {len(content)} bytes, or another digest than indexed")
            return content
        except (OSError, ValueError) as error:
            logger.error("image %s: %s", one.digest, error)
            problem = "the image cannot be read as it was indexed; the server's log has the reason"
    raise _gone(problem)


def _small(service: Service, content: bytes, size: int) -> bytes:
    """Returns an image as JPEG, no larger than a number of pixels on its longer side."""
    try:
        pixels, _ = service.inputs.decoders.open(content, size, background=_WHITE)
    except ValueError as error:
        raise _gone(str(error).partition("; shrink it first")[0]) from error
    image = Image.fromarray(pixels)
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY, subsampling=0)
    return stream.getvalue()


def _gone(message: str) -> ApiError:
    return ApiError(404, message, param="id", code="no_picture")


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
        with _index_read():
            moments = await asyncio.to_thread(service.index.with_digest, id)
        stream, name = await asyncio.to_thread(_opened, service.index, moments)
    status = os.fstat(stream.fileno())
    size, tag = status.st_size, f'"{status.st_size:x}-{status.st_mtime_ns:x}"'
    kind = mimetypes.guess_type(name)[0] or ""
    kind = kind if kind.startswith("video/") else "application/octet-stream"
    headers = {**_HEADERS, "Accept-Ranges": "bytes", "Cache-Control": "private, no-cache", "ETag": tag}
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
