"""`POST /v1/rerank`: the protocol of Jina and Cohere, with documents that are texts or pictures."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from annotated_types import Len
from fastapi import APIRouter, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from bridgetower.inference import Item
from bridgetower.serve.bodies import JsonRoute
from bridgetower.serve.config import MOST_ITEMS
from bridgetower.serve.errors import ApiError
from bridgetower.serve.inputs import is_picture
from bridgetower.serve.schemas import COMPUTING, PICTURE, Body, Modality, Text, Truncate, Usage, json_of
from bridgetower.serve.service import Served, Service

router = APIRouter(route_class=JsonRoute, tags=["rerank"])


class Document(BaseModel):
    """A text or a picture."""

    model_config = ConfigDict(extra="forbid")

    text: Text | None = None
    image: str | None = Field(None, description="Data URI.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.text is None) == (self.image is None):
            raise ValueError("expected either text or image")
        return self

    @property
    def modality(self) -> Modality:
        """What it is."""
        return "text" if self.image is None else "image"

    @property
    def content(self) -> str:
        """The text, or the data URI."""
        return self.text or self.image or ""


def _document(given: Any) -> Any:
    if isinstance(given, str):
        return {"image" if is_picture(given) else "text": given}
    return given


TextOrPicture = Annotated[Document, BeforeValidator(_document, json_schema_input_type=str | Document)]
"""A text, the data URI of a picture, or either by name."""


class RerankRequest(Body):
    """A query and documents, which are all texts or all pictures."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"query": "a red square", "documents": [{"image": PICTURE}]},
                {"query": "a red square", "documents": ["two dogs in the snow", "a square in red"], "top_n": 1},
            ]
        }
    )

    query: TextOrPicture
    documents: Annotated[list[TextOrPicture], Len(1, MOST_ITEMS)]
    top_n: int | None = Field(None, ge=1, description="Results to return; all of them if left out.")
    return_documents: bool = Field(False, description="Repeat the documents in the results.")
    truncate: Truncate = False


class Result(BaseModel):
    """A document."""

    index: int = Field(description="Its number in the request.")
    relevance_score: float
    document: Document | None = None


class RerankResponse(BaseModel):
    """Documents, the most relevant first."""

    model: str
    scored_by: Literal["matching", "cosine"] = Field(
        description="The probability that text and picture match, or the cosine of two texts or of two pictures."
    )
    results: list[Result]
    usage: Usage


@router.post("/v1/rerank", response_model=RerankResponse, response_model_exclude_none=True, responses=COMPUTING)
async def rerank(body: RerankRequest, service: Served) -> Response:
    """Sort documents by their relevance to a query.

    A text is matched with pictures, and a picture with texts, by the whole model. Texts are compared with a text, and
    pictures with a picture, by the cosine of their vectors.
    """
    modalities = {document.modality for document in body.documents}
    if len(modalities) > 1:
        message = "documents are texts and pictures, whose scores cannot be compared; send two requests"
        raise ApiError(400, message, param="documents")
    same = body.query.modality in modalities
    service.check_use("embeddings" if same else "match")
    with service.admission(len(body.documents) + same, "documents", body.model):
        scores, tokens = await (_cosines if same else _matches)(body, service)
    order = sorted(range(len(scores)), key=lambda number: -scores[number])[: body.top_n]
    results = [
        Result(
            index=number,
            relevance_score=scores[number],
            document=body.documents[number] if body.return_documents else None,
        )
        for number in order
    ]
    content = RerankResponse(
        model=service.name,
        scored_by="cosine" if same else "matching",
        results=results,
        usage=Usage.of(tokens),
    )
    return json_of(content)


async def _matches(body: RerankRequest, service: Service) -> tuple[list[float], int]:
    query, documents = [body.query.content], [document.content for document in body.documents]
    numbers = range(len(documents))
    if body.query.modality == "text":
        pairs, params = [(number, 0) for number in numbers], ("documents", "query")
        return await service.pairs("match", documents, query, pairs, params=params, truncate=body.truncate)
    pairs, params = [(0, number) for number in numbers], ("query", "documents")
    return await service.pairs("match", query, documents, pairs, params=params, truncate=body.truncate)


async def _cosines(body: RerankRequest, service: Service) -> tuple[list[float], int]:
    query, documents = [body.query.content], [document.content for document in body.documents]
    if body.query.modality == "text":
        cut = body.truncate
        texts = [
            *await service.inputs.texts(query, "query", truncate=cut),
            *await service.inputs.texts(documents, "documents", truncate=cut),
        ]
        items, tokens = [Item(ids=ids) for ids in texts], service.tokens([], texts)
    else:
        images = [*await service.inputs.images(query, "query"), *await service.inputs.images(documents, "documents")]
        items, tokens = [Item(image=image.pixels) for image in images], service.tokens(images, [])
    first, *vectors = await service.batcher.submit(items)
    return [float(first @ vector) for vector in vectors], tokens
