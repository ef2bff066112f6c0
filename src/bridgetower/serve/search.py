"""Routes of the index: searches in two stages as `bridgetower search`, its images, and its videos."""

from __future__ import annotations

import asyncio
import io
import logging
import mimetypes
import os
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack
from functools import partial
from hashlib import sha256
from typing import Annotated, Any, TypeVar

import torch
from fastapi import APIRouter, Header, Query, Response
from fastapi import Path as InPath
from fastapi.responses import StreamingResponse
from PIL import Image
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from bridgetower.inference.items import Item
from bridgetower.processor import media_type
from bridgetower.search.conditions import condition_sql
from bridgetower.search.config import Against, Vectors
from bridgetower.search.indexed import Hit, Indexed
from bridgetower.search.searcher import (
    RERANK,
    Searcher,
    candidates,
    fuse_rankings,
    mean_vector,
    two_stages,
)
from bridgetower.serve.access import video_token
from bridgetower.serve.config import ServeConfig
from bridgetower.serve.costs import Unit
from bridgetower.serve.errors import ApiError
from bridgetower.serve.schemas import (
    COMPUTING,
    PROBABILITY,
    SCORE,
    Body,
    JsonRoute,
    ListResponse,
    Source,
    Text,
    Top,
    errors,
)
from bridgetower.serve.service import MIB, Served, Service

router = APIRouter(route_class=JsonRoute, tags=["search"])
logger = logging.getLogger(__name__)

PIECE = 2**21  # bytes of a response to a range at most; players request the next one
_CHUNK = 2**16  # bytes of a whole video that are read at once
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII | re.IGNORECASE)
_Result = TypeVar("_Result")
_NUM_EXAMPLES = 12
_JPEG_QUALITY = 88
_HEADERS = {
    "Cache-Control": "private, max-age=86400",  # an id names one content for ever
    "Content-Disposition": "inline",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Vary": "Authorization",
    "X-Content-Type-Options": "nosniff",
}

Id = Annotated[
    str, InPath(pattern="^[0-9a-f]{64}$", description="As a hit of `/v1/search` has it.")
]
_EXAMPLE = {"query": "a red flag", "top": 3, "rerank": 8, "where": {"width": {"gte": 8}}}


class SearchRequest(Body, json_schema_extra={"examples": [_EXAMPLE]}):
    """A text, an image or both, and which images to search."""

    query: Text | None = Field(None, description="Description of the images to find.")
    image: Source | None = Field(
        None, description="An image, as elsewhere; similar images are found."
    )
    top: Top = 10
    rerank: int | None = Field(
        None,
        ge=0,
        le=256,
        description=f"Candidates matched with the text; if left out {RERANK}, or what the limit of items leaves; 0 "
        "where validation did not find that matching ranks better, and for what is said.",
    )
    where: Annotated[dict[str, Any], AfterValidator(condition_sql)] | None = Field(
        None,
        description='Condition on path, size, mtime, width, height, captions, start and end, such as {"width": {"gte": '
        '800}, "path": {"like": "%.jpg"}}. Operators are eq, ne, gt, gte, lt, lte, in, like (of path) and contains (of '
        'captions); {"and": […]}, {"or": […]} and {"not": {…}} combine conditions.',
    )
    against: Against | None = Field(
        None,
        description="What the query is compared with: vectors of images, captions or both together (pairs), the words "
        "of captions and transcripts, or words and vectors (hybrid); if left out images, and for a text alone in "
        "moments of videos what is said: hits by transcripts and by images then take turns.",
    )
    exact: bool = Field(
        False, description="Compare with every vector, even where the index could leave most out."
    )


class IndexedImage(BaseModel):
    id: str = Field(description="For `/v1/images/{id}`: SHA-256 of the file when it was indexed.")
    path: str = Field(description="As the index has it.")
    width: int
    height: int
    captions: list[str]
    start: float | None = Field(None, description="Of a moment of a video: seconds from its start.")
    end: float | None = Field(None, description="Likewise.")


class FoundImage(IndexedImage):
    rank: int
    against: Against = Field(description="What the query was compared with.")
    cosine: float = Field(description="Of the vectors of both.")
    rank_score: float = Field(
        description="What ranks it: log-odds of a match + the model's weight · cosine if matched, else the cosine; of "
        "words BM25; of hybrid the sum of reciprocal ranks."
    )
    weak: bool | None = Field(
        None,
        description="Of a text alone: whether the vector is no nearer than one in twenty unrelated texts comes, and a "
        "match is not probable. Not of hits by words.",
    )
    probability: float | None = PROBABILITY
    score: float | None = SCORE
    transcript: str | None = Field(None, description="What is said in a moment of a video.")
    link: str | None = Field(
        None, description="Where a moment of a video plays: on this server, or at its URL."
    )


class SearchResponse(ListResponse[FoundImage]):
    """Images: the matched ones first, then the nearest, both by `rank_score`."""


@router.post("/v1/search", response_model=SearchResponse, responses=COMPUTING)
async def search(body: SearchRequest, service: Served) -> Response:
    """Find images of the index by a text, by an image, or by both."""
    searcher = _searcher(service)
    model = service.main

    # How many candidates are matched.
    plan = partial(searcher.plan, top=body.top, rerank=body.rerank, against=body.against)
    vectors, rerank = await _read(plan, body.query, body.image, is_request=True)
    rerank = min(rerank, await _read(len, searcher.index))
    num_inputs = (body.query is not None) + (body.image is not None)
    if body.rerank is None:
        rerank = max(0, min(rerank, service.config.max_items - num_inputs))

    work: dict[Unit, int] = {
        "text": body.query is not None,
        "image": body.image is not None,
        "pair": rerank,
    }
    with service.admission(work, "rerank", body.model, images=[body.image]):
        # The vector of the query; of a text and an image, their mean.
        (image,) = await model.images([body.image], "image")
        ids = None
        if body.query is not None:
            (ids,) = await model.texts([body.query], "query", truncate=body.truncate)
        items = [Item(image=image, ids=ids)]
        if vectors != "pairs" and num_inputs == 2:
            items = [Item(image=image), Item(ids=ids)]
        query = mean_vector(torch.stack(await service.scheduler.submit(items)))

        # Hits by vectors, of which the first are matched, and hits by words.
        nearest, containing = await _find(body, searcher, query, vectors, rerank)
        matched, unmatched = candidates(nearest, rerank, vectors)
        # Decode the images of those to match, without images that cannot be opened.
        open_candidate = partial(
            searcher.open,
            prepare=model.prepared,
            max_bytes=service.config.max_body * MIB,
            fetch=False,
            frames=await _read(searcher.index.frames, matched) if matched else {},
        )
        images = await model.each(*(partial(open_candidate, hit) for hit in matched))
        try:
            opened = searcher.opened(matched, images)
        except ValueError as error:
            logger.error("search: %s", error)
            message = "none of the images that were found can be opened where the index has them; send rerank 0"
            raise ApiError(404, message, code="no_images") from error
        pairs = [Item(kind="match", image=image.pixels, ids=ids) for _, image in opened]
        log_odds = await service.scheduler.submit(pairs)
        hits = two_stages(
            [hit for hit, _ in opened],
            log_odds,
            unmatched,
            searcher.predictor.reranking,
            await _read(searcher.unrelated, body.query, body.image),
        )
        if body.against == "words":
            hits = containing
        elif body.against == "hybrid":
            hits = fuse_rankings(hits, containing)

    rows = (
        {"rank": rank, **_response_fields(hit), **_moment(hit, service.config)}
        for rank, hit in enumerate(hits[: body.top], start=1)
    )
    return await service.list_response(rows, [*items, *pairs])


async def _find(
    body: SearchRequest,
    searcher: Searcher,
    query: torch.Tensor,
    vectors: Vectors | None,
    rerank: int,
) -> tuple[list[Hit], list[Hit]]:
    """Returns the nearest hits by vectors, and those that contain words of the query."""
    where: Any = body.where  # in SQL, since it was validated
    count = max(body.top, rerank, RERANK if body.against == "hybrid" else 0)
    read = partial(_read, is_request=where is not None, param="where")
    nearest = list[Hit]()
    containing = list[Hit]()
    if body.against != "words":
        find_nearest = partial(
            searcher.index.nearest, against=vectors, where=where, exact=body.exact
        )
        nearest = await read(find_nearest, query, count)
    if body.against in ("words", "hybrid"):
        find_words = partial(searcher.index.containing, body.query or "", where=where)
        containing = await read(find_words, query, count)
    return nearest, containing


def _searcher(service: Service) -> Searcher:
    assert service.searcher is not None, "these routes are there only with an index"
    return service.searcher


def _response_fields(image: Indexed) -> dict[str, Any]:
    fields = FoundImage.model_fields
    values = {name: value for name, value in vars(image).items() if name in fields}
    return {"id": image.digest, **values}


def _moment(hit: Hit, config: ServeConfig) -> dict[str, str]:
    """Returns the fields that only a moment of a video has."""
    if hit.start is None:
        return {}
    address = f"{config.root_path}/v1/videos/{hit.digest}"
    if config.api_key is not None:
        address += f"?token={video_token(config.api_key, hit.digest)}"
    if isinstance(hit.file, str):
        address = hit.file
    span = hit.path.rpartition("#")[2]
    return {"transcript": " ".join(hit.captions), "link": f"{address}#{span}"}


async def _read(
    function: Callable[..., _Result],
    *arguments: Any,
    is_request: bool = False,
    param: str | None = None,
) -> _Result:
    """Reads the index in a thread. With `is_request`, a ValueError is an error of the request, else of the index."""
    try:
        return await asyncio.to_thread(function, *arguments)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and is_request:
            raise ApiError(400, str(error), param=param) from error
        logger.error("index: %s", error)
        message = "the index cannot be read; the server's log has the reason"
        raise ApiError(503, message, code="index_unavailable") from error


class IndexResponse(BaseModel):
    images: int = Field(description="How many there are.")
    examples: list[IndexedImage] = Field(description="Some of them, from all over the index.")


@router.get("/v1/index", response_model_exclude_none=True, responses=errors(401, 503))
async def index(service: Served) -> IndexResponse:
    """Return the number of images in the index, and some of them."""
    index = _searcher(service).index
    count = await _read(len, index)
    examples = await _read(index.examples, _NUM_EXAMPLES)
    return IndexResponse(
        images=count, examples=[IndexedImage(**_response_fields(image)) for image in examples]
    )


def _check_digits(value: Any) -> Any:
    if isinstance(value, str) and not (value.isascii() and value.isdigit()):
        raise ValueError(f"{value[:80]!r} is given; expected a whole number of pixels, such as 300")
    return value


_SIZE = "Longer side of a JPEG, in pixels; none: the file itself."


@router.get(
    "/v1/images/{id}",
    response_class=Response,
    responses={200: {"content": {"image/*": {}}}, **errors(400, 401, 404, 413, 429, 503)},
)
async def image(
    id: Id,  # noqa: A002 - its name in the path
    service: Served,
    size: Annotated[
        int | None, BeforeValidator(_check_digits), Query(ge=16, le=1600, description=_SIZE)
    ] = None,
    if_none_match: str | None = Header(None, description="The `ETag` of what the client has."),
) -> Response:
    """Return an image of the index: small as JPEG, or as the file that was indexed."""
    index = _searcher(service).index
    limit = service.config.max_body * MIB

    def indexed_file(copy: Indexed) -> bytes:
        content = index.content(copy, within_root=True, fetch=False, max_bytes=limit)
        is_frame = copy.is_moment
        if is_frame and (len(content) > limit or sha256(content).hexdigest() != copy.digest):
            raise ValueError(
                f"the frame of {copy.path} has {len(content)} bytes, or another digest than indexed"
            )
        return content

    def read_image(copies: Sequence[Indexed]) -> tuple[bytes, str]:
        content = _first_readable(copies, indexed_file, "image")
        try:
            if size is None:
                return content, media_type(content)
            # As the model sees it.
            background = service.main.predictor.processor.config.background
            pixels, _ = service.main.decoders.open(content, size, background=background)
        except ValueError as error:
            message = str(error).partition("; shrink it first")[0]
            raise ApiError(404, message, param="id", code="no_image") from error
        thumbnail = Image.fromarray(pixels)
        thumbnail.thumbnail((size, size), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        thumbnail.save(stream, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
        return stream.getvalue(), "image/jpeg"

    tag = f'"{id}-{size or "file"}"'
    headers = {**_HEADERS, "ETag": tag}
    with service.admission({"image": 1}, "id", None):
        copies = await _read(index.with_digest, id)
        if copies and _has_tag(if_none_match, tag):
            return Response(status_code=304, headers=headers)
        ((content, kind),) = await service.main.each(partial(read_image, copies))
    return Response(content, media_type=kind, headers=headers)


def _has_tag(if_none_match: str | None, tag: str) -> bool:
    """Tells whether a client has the content of a tag, by its header `If-None-Match`.

    Tags are compared weakly, as the header asks: a proxy that compresses makes weak ones of them.
    """
    tags = {entry.strip().removeprefix("W/") for entry in (if_none_match or "").split(",")}
    return tag in tags or "*" in tags


def _first_readable(
    copies: Sequence[Indexed], read: Callable[[Indexed], _Result], kind: str
) -> _Result:
    """Reads the first copy of an image or a video that is still as it was indexed."""
    problem = f"the index has no {kind} with this id"
    for copy in copies:
        try:
            return read(copy)
        except (OSError, ValueError) as error:
            logger.error("%s %s: %s", kind, copy.digest, error)
            reason = "cannot be read as it was indexed; the server's log has the reason"
            problem = f"the {kind} {reason}"
    raise ApiError(404, problem, param="id", code=f"no_{kind}")


@router.get(
    "/v1/videos/{id}",
    response_class=Response,
    responses={
        200: {"content": {"video/*": {}}},
        206: {},
        416: {},
        **errors(400, 401, 404, 429, 503),
    },
)
async def video(
    id: Id,  # noqa: A002 - its name in the path
    service: Served,
    range: str | None = Header(None, description="One range of bytes; others are ignored."),  # noqa: A002 - its name in the headers
    if_none_match: str | None = Header(None, description="The `ETag` of what the client has."),
    if_range: str | None = Header(None, description="The `ETag` that the range is of."),
) -> Response:
    """Return the video of a moment, or a piece of at most 2 MiB of it if a range is asked for."""
    index = _searcher(service).index
    with service.admission({"image": 1}, "id", None):
        copies = await _read(index.with_digest, id)
        moments = [copy for copy in copies if copy.is_moment]
        stream, path = await asyncio.to_thread(
            _first_readable, moments, lambda copy: (index.open_video(copy), copy.path), "video"
        )

    status = os.fstat(stream.fileno())
    size = status.st_size
    tag = f'"{size:x}-{status.st_mtime_ns:x}"'
    kind = mimetypes.guess_type(path.rpartition("#")[0])[0] or ""
    if not kind.startswith("video/"):
        kind = "application/octet-stream"
    headers = {
        **_HEADERS,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "ETag": tag,
    }

    async def chunks() -> AsyncIterator[bytes]:
        with stream:
            while content := await asyncio.to_thread(stream.read, _CHUNK):
                yield content

    with ExitStack() as until_sent:
        until_sent.enter_context(stream)
        if _has_tag(if_none_match, tag):
            return Response(status_code=304, headers=headers)
        limits = None
        if range is not None and if_range in (None, tag):
            limits = _byte_limits(range, size)
        if limits is None:
            until_sent.pop_all()
            headers["Content-Length"] = str(size)
            return StreamingResponse(chunks(), media_type=kind, headers=headers)
        start, end = limits
        content = await asyncio.to_thread(os.pread, stream.fileno(), end - start, start)
    headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{size}"
    return Response(content, 206, media_type=kind, headers=headers)


def _byte_limits(header: str, size: int) -> tuple[int, int] | None:
    """Returns the start and the end of a valid range, cut to `PIECE` bytes, else None (RFC 9110, 14.2)."""
    range_match = _RANGE.fullmatch(header.strip())
    first, last = range_match.groups() if range_match else ("", "")
    if not (first or last) or (first and last and int(last) < int(first)):
        return None
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1 if first and last else size)
    if start >= end:
        message = f"the range is {header[:80]!r}; expected one like bytes=0-999 within {size} bytes"
        raise ApiError(416, message, param="range", headers={"Content-Range": f"bytes */{size}"})
    return start, min(end, start + PIECE)
