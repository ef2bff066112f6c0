"""`POST /v1/search`: pictures of the index, in two stages as `bridgetower search` finds them."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any

import torch
from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator

from bridgetower.inference import Item, Tokens
from bridgetower.processor import Resized
from bridgetower.search.searcher import COLUMNS, RERANK, Against, Searcher, mean_vector, two_stages
from bridgetower.search.table import Hit
from bridgetower.serve.bodies import JsonRoute
from bridgetower.serve.conditions import MAX_CHARACTERS, parsed_condition
from bridgetower.serve.errors import ApiError
from bridgetower.serve.schemas import COMPUTING, Body, Listed, Text, Top, Truncate, Usage, json_of
from bridgetower.serve.service import MIB, Served, Service

router = APIRouter(route_class=JsonRoute, tags=["search"])
logger = logging.getLogger(__name__)


class SearchRequest(Body):
    """A text, a picture or both, and which pictures to look through."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"query": "a red flag", "top": 3, "rerank": 8, "where": "width >= 8"}]}
    )

    query: Text | None = Field(None, description="What should be seen.")
    image: str | None = Field(None, description="Data URI of a picture that the hits should be like.")
    top: Top = 10
    rerank: int | None = Field(
        None,
        ge=0,
        le=256,
        description=f"Candidates matched with the text; if left out {RERANK}, or what the limit of items leaves.",
    )
    where: str | None = Field(
        None,
        max_length=MAX_CHARACTERS,
        description="Condition in SQL on path, size, mtime, width, height and captions, without functions.",
    )
    against: Against = Field("images", description="What the query is compared with.")
    exact: bool = Field(False, description="Compare with every vector, even where the index could leave most out.")
    truncate: Truncate = False

    @field_validator("where")
    @classmethod
    def _harmless(cls, given: str | None) -> str | None:
        return None if given is None else parsed_condition(given)


class Picture(BaseModel):
    """A picture that was found."""

    rank: int
    id: str = Field(description="For `/v1/pictures/{id}`: SHA-256 of the file when it was indexed.")
    path: str = Field(description="As the index has it.")
    cosine: float = Field(description="Of the query's vector and the picture's.")
    probability: float | None = Field(None, description="That text and picture match; only of what was matched.")
    width: int
    height: int
    captions: list[str]


class SearchResponse(Listed[Picture]):
    """Pictures, the likeliest match first, then the nearest."""


@router.post("/v1/search", response_model=SearchResponse, responses=COMPUTING)
async def search(body: SearchRequest, service: Served) -> Response:
    """Find pictures of the index by a text, by a picture, or by both."""
    hits, tokens = await found(body, service)
    data = [
        Picture(
            rank=rank,
            id=hit.digest,
            path=hit.path,
            cosine=hit.cosine,
            probability=hit.probability,
            width=hit.width,
            height=hit.height,
            captions=list(hit.captions),
        )
        for rank, hit in enumerate(hits, start=1)
    ]
    return json_of(SearchResponse(data=data, model=service.name, usage=Usage.of(tokens)))


async def found(body: SearchRequest, service: Service) -> tuple[list[Hit], int]:
    """Returns what a search finds, and the tokens that were read for it.

    Raises:
        ApiError: The request cannot be met.
        QueueFullError: There is no room.
    """
    searcher = service.searcher
    assert searcher is not None, "searches are there only with an index"
    try:
        rerank = searcher.num_candidates(body.query, body.image, body.top, body.rerank, body.against)
    except ValueError as error:
        raise ApiError(400, str(error)) from error
    given = sum(part is not None for part in (body.query, body.image))
    if body.rerank is None:
        rerank = max(0, min(rerank, service.config.max_items - given))
    with service.admission(given + rerank, "rerank", body.model):
        return await _found(body, service, searcher, rerank)


async def _found(body: SearchRequest, service: Service, searcher: Searcher, rerank: int) -> tuple[list[Hit], int]:
    """Does what `Searcher.search` does, but computes in the batches of all requests."""
    images = [] if body.image is None else await service.inputs.images([body.image], "image")
    texts = [] if body.query is None else await service.inputs.texts([body.query], "query", truncate=body.truncate)
    if body.against == "pairs":
        items = [Item(image=images[0].pixels, ids=texts[0])]
    else:
        items = [*(Item(image=image.pixels) for image in images), *(Item(ids=ids) for ids in texts)]
    vector = mean_vector(torch.stack(await service.batcher.submit(items)))
    try:
        nearest = await asyncio.to_thread(
            searcher.index.nearest,
            vector,
            max(body.top, rerank),
            column=COLUMNS[body.against],
            where=body.where,
            exact=body.exact,
        )
    except ValueError as error:
        raise ApiError(400, str(error), param="where") from error
    matched, probabilities = await _matched(service, searcher, nearest[:rerank], texts)
    ranked = two_stages([one for one, _ in matched], probabilities, nearest[rerank:])[: body.top]
    tokens = service.tokens([*images, *(image for _, image in matched)], texts)
    return ranked, tokens


async def _matched(
    service: Service, searcher: Searcher, found: list[Hit], texts: list[Tokens]
) -> tuple[list[tuple[Hit, Resized]], list[float]]:
    """Returns candidates with their images, and the probability of each."""
    if not found:
        return [], []
    try:
        limits = {"max_pixels": service.max_pixels, "max_bytes": service.config.max_body * MIB}
        images = await service.inputs.each([partial(searcher.open, one, **limits) for one in found])
        opened = searcher.usable(found, images)
    except ValueError as error:
        logger.error("search: %s", error)
        message = "none of the pictures that were found can be opened where the index has them; send rerank 0"
        raise ApiError(404, message, code="no_pictures") from error
    items = [Item(kind="match", image=image.pixels, ids=texts[0]) for _, image in opened]
    probabilities: list[Any] = await service.batcher.submit(items)
    return opened, probabilities
