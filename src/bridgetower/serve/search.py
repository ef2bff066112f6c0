"""The index: `POST /v1/search` in two stages as `bridgetower search`, `GET /v1/index`, its images, pieces of videos."""

from __future__ import annotations

import asyncio
import io
import logging
import mimetypes
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
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
from bridgetower.search.config import Against
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
    json_of,
    listed,
)
from bridgetower.serve.service import MIB, Served, Service

router = APIRouter(route_class=JsonRoute, tags=["search"])
logger = logging.getLogger(__name__)

PIECE = 2**21  # bytes at most of an answer to a request for a range; players ask for the next one
_CHUNK = 2**16  # bytes of a whole video that are read at once
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII | re.IGNORECASE)
_Result = TypeVar("_Result")
_EXAMPLES = 12
_QUALITY = 88  # of a JPEG
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
    """Images: what was matched first, then the nearest, both by `rank_score`."""


@router.post("/v1/search", response_model=SearchResponse, responses=COMPUTING)
async def search(body: SearchRequest, service: Served) -> Response:
    """Find images of the index by a text, by an image, or by both."""
    searcher, config, model = _searcher(service), service.config, service.main
    plan = partial(searcher.plan, top=body.top, rerank=body.rerank, against=body.against)
    against, rerank = await _read(plan, body.query, body.image, asked=True)
    rerank = min(rerank, await _read(len, searcher.index))
    given = sum(part is not None for part in (body.query, body.image))
    if body.rerank is None:
        rerank = max(0, min(rerank, config.max_items - given))
    work: dict[Unit, int] = {
        "text": body.query is not None,
        "image": body.image is not None,
        "pair": rerank,
    }
    with service.admission(work, "rerank", body.model, images=[body.image]):
        (image,) = await model.images([body.image], "image")
        texts = (
            []
            if body.query is None
            else await model.texts([body.query], "query", truncate=body.truncate)
        )
        if against == "pairs" and image is not None and texts:
            items = [Item(image=image, ids=texts[0])]
        else:
            items = [
                *(Item(image=one) for one in [image] if one is not None),
                *(Item(ids=ids) for ids in texts),
            ]
        vector = mean_vector(torch.stack(await service.scheduler.submit(items)))
        where: Any = body.where  # in SQL, since it was validated
        count = max(body.top, rerank, RERANK if body.against == "hybrid" else 0)
        reading = partial(_read, asked=where is not None, param="where")
        nearest, containing = list[Hit](), list[Hit]()
        if body.against != "words":
            find = partial(searcher.index.nearest, against=against, where=where, exact=body.exact)
            nearest = await reading(find, vector, count)
        if body.against in ("words", "hybrid"):
            containing = await reading(
                partial(searcher.index.containing, body.query or "", where=where), vector, count
            )
        chosen, others = candidates(nearest, rerank, against)
        frames = await _read(searcher.index.frames, chosen) if chosen else {}
        limit = config.max_body * MIB
        read = partial(
            searcher.open, prepare=model.prepared, max_bytes=limit, fetch=False, frames=frames
        )
        try:
            opened = searcher.opened(
                chosen, await model.each(*(partial(read, one) for one in chosen))
            )
        except ValueError as error:
            logger.error("search: %s", error)
            message = "none of the images that were found can be opened where the index has them; send rerank 0"
            raise ApiError(404, message, code="no_images") from error
        matched = [Item(kind="match", image=image.pixels, ids=texts[0]) for _, image in opened]
        log_odds = await service.scheduler.submit(matched)
        unrelated = await _read(searcher.unrelated, body.query, body.image)
        hits = two_stages(
            [one for one, _ in opened], log_odds, others, searcher.predictor.reranking, unrelated
        )
        if body.against in ("words", "hybrid"):
            hits = containing if body.against == "words" else fuse_rankings(hits, containing)
        hits = hits[: body.top]

    def rows() -> Iterator[dict[str, Any]]:
        for rank, hit in enumerate(hits, start=1):
            moment = {}
            if hit.start is not None:
                token = (
                    ""
                    if config.api_key is None
                    else f"?token={video_token(config.api_key, hit.digest)}"
                )
                place = (
                    hit.file
                    if isinstance(hit.file, str)
                    else f"{config.root_path}/v1/videos/{hit.digest}{token}"
                )
                moment = {
                    "transcript": " ".join(hit.captions),
                    "link": f"{place}#{hit.path.rpartition('#')[2]}",
                }
            yield {"rank": rank, **_shown(hit), **moment}

    tokens = model.tokens([*items, *matched])
    return await json_of(service.writers, listed(rows(), model.name, tokens))


def _searcher(service: Service) -> Searcher:
    assert service.searcher is not None, "these routes are there only with an index"
    return service.searcher


def _shown(one: Indexed) -> dict[str, Any]:
    return {"id": one.digest} | {
        name: value for name, value in vars(one).items() if name in FoundImage.model_fields
    }


async def _read(
    work: Callable[..., _Result], *given: Any, asked: bool = False, param: str | None = None
) -> _Result:
    """Reads the index, or answers that it cannot be read; a ValueError is of the request where one asks of it."""
    try:
        return await asyncio.to_thread(work, *given)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and asked:
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
    count, examples = await _read(lambda: (len(index), index.examples(_EXAMPLES)))
    return IndexResponse(images=count, examples=[IndexedImage(**_shown(one)) for one in examples])


def _digits(given: Any) -> Any:
    if isinstance(given, str) and not (given.isascii() and given.isdigit()):
        raise ValueError("expected a whole number")
    return given


@router.get(
    "/v1/images/{id}",
    response_class=Response,
    responses={200: {"content": {"image/*": {}}}, **errors(400, 401, 404, 413, 429, 503)},
)
async def image(
    id: Id,  # noqa: A002 - its name in the path
    service: Served,
    size: Annotated[
        int | None,
        BeforeValidator(_digits),
        Query(
            ge=16, le=1600, description="Longer side of a JPEG, in pixels; none: the file itself."
        ),
    ] = None,
    if_none_match: str | None = Header(None, description="The `ETag` of what the client has."),
) -> Response:
    """Return an image of the index: small as JPEG, or as the file that was indexed."""
    index, headers = (
        _searcher(service).index,
        {**_HEADERS, "ETag": (tag := f'"{id}-{size or "file"}"')},
    )
    with service.admission({"image": 1}, "id", None):
        copies = await _read(index.with_digest, id)
        if copies and _has_tag(if_none_match, tag):
            return Response(status_code=304, headers=headers)

        def content_of(one: Indexed) -> bytes:
            limit = service.config.max_body * MIB
            content = index.content(one, within_root=True, fetch=False, max_bytes=limit)
            if one.start is not None and (
                len(content) > limit or sha256(content).hexdigest() != one.digest
            ):
                raise ValueError(
                    f"the frame of {one.path} has {len(content)} bytes, or another digest than indexed"
                )
            return content

        def read() -> tuple[bytes, str]:
            content = _first(copies, content_of, "image")
            try:
                if size is None:
                    return content, media_type(content)
                # as the model sees it
                background = service.main.predictor.processor.config.background
                pixels, _ = service.main.decoders.open(content, size, background=background)
            except ValueError as error:
                message = str(error).partition("; shrink it first")[0]
                raise ApiError(404, message, param="id", code="no_image") from error
            image = Image.fromarray(pixels)
            image.thumbnail((size, size), Image.Resampling.LANCZOS)
            image.save(stream := io.BytesIO(), "JPEG", quality=_QUALITY, subsampling=0)
            return stream.getvalue(), "image/jpeg"

        ((content, kind),) = await service.main.each(read)
    return Response(content, media_type=kind, headers=headers)


def _has_tag(if_none_match: str | None, tag: str) -> bool:
    """Whether a client has what the tag names, by its header `If-None-Match`.

    Tags are compared weakly, as the header asks: a proxy that compresses makes weak ones of them.
    """
    tags = {entry.strip().removeprefix("W/") for entry in (if_none_match or "").split(",")}
    return tag in tags or "*" in tags


def _first(copies: Sequence[Indexed], opened: Callable[[Indexed], _Result], kind: str) -> _Result:
    """Opens the first of what has one id in the index that can be opened as it was indexed."""
    problem = f"the index has no {kind} with this id"
    for one in copies:
        try:
            return opened(one)
        except (OSError, ValueError) as error:
            logger.error("%s %s: %s", kind, one.digest, error)
            problem = (
                f"the {kind} cannot be read as it was indexed; the server's log has the reason"
            )
    raise ApiError(404, problem, param="id", code="no_video" if kind == "video" else "no_image")


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
        moments = [copy for copy in copies if copy.start is not None]
        stream, path = await asyncio.to_thread(
            _first, moments, lambda one: (index.open_video(one), one.path), "video"
        )
    status = os.fstat(stream.fileno())
    size, tag = status.st_size, f'"{status.st_size:x}-{status.st_mtime_ns:x}"'
    kind = mimetypes.guess_type(path.rpartition("#")[0])[0] or ""
    kind = kind if kind.startswith("video/") else "application/octet-stream"
    headers = {
        **_HEADERS,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "ETag": tag,
    }

    async def whole() -> AsyncIterator[bytes]:
        with stream:
            while content := await asyncio.to_thread(stream.read, _CHUNK):
                yield content

    with ExitStack() as until_sent:
        until_sent.enter_context(stream)
        if _has_tag(if_none_match, tag):
            return Response(status_code=304, headers=headers)
        piece = None if range is None or if_range not in (None, tag) else _piece(range, size)
        if piece is None:
            until_sent.pop_all()
            headers["Content-Length"] = str(size)
            return StreamingResponse(whole(), media_type=kind, headers=headers)
        start, end = piece
        content = await asyncio.to_thread(os.pread, stream.fileno(), end - start, start)
    headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{size}"
    return Response(content, 206, media_type=kind, headers=headers)


def _piece(given: str, size: int) -> tuple[int, int] | None:
    """Returns where one valid range begins and ends, cut to `PIECE` bytes; others are ignored (RFC 9110, 14.2)."""
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
