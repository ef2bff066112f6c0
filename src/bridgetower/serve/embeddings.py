"""`POST /v1/embeddings` in OpenAI's protocol, and `/v1/rerank` in that of Jina and Cohere; both take images too."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal, Self

import torch
from fastapi import APIRouter, Response
from pydantic import BaseModel, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from bridgetower.inference import Item
from bridgetower.serve.errors import ApiError
from bridgetower.serve.inputs import IMAGE, is_image
from bridgetower.serve.schemas import (
    COMPUTING,
    Body,
    JsonRoute,
    Listed,
    Modality,
    Several,
    Source,
    Text,
    Usage,
    json_of,
    listed,
    usage,
)
from bridgetower.serve.service import Served

router = APIRouter(route_class=JsonRoute)


class TextPart(BaseModel, extra="forbid"):
    type: Literal["text"]
    text: Text


class Url(BaseModel):
    url: Source


class ImagePart(BaseModel, extra="forbid"):
    type: Literal["image_url"]
    image_url: Url


class Message(BaseModel, extra="forbid"):
    """A message with at most one image and one text."""

    role: Literal["user"]
    content: Text | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Several]


class Content(BaseModel, extra="forbid"):
    """A text, an image, or both."""

    text: str | None = None
    image: Source | None = None

    @model_validator(mode="before")
    @classmethod
    def _object(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ValueError("expected a string, or an object with text, image or both")
        return given

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.text is None and self.image is None:
            raise ValueError("expected text, image or both")
        return self


_PARTS = [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": "a red square"}]
_EMBEDDINGS = [
    {"input": ["two dogs in the snow", "a red square"]},
    {"input": IMAGE, "modality": "image"},
    {"input": [{"text": "a red square", "image": IMAGE}, {"text": "a red square"}]},
    {"messages": [{"role": "user", "content": _PARTS}], "encoding_format": "base64"},
]


_Entries = str | Content | Annotated[list[str | Content], Several]


class EmbeddingsRequest(Body, json_schema_extra={"examples": _EMBEDDINGS}):
    """Texts, images, or images with texts, each of which gets a vector; or one message, whose parts get one together.

    Entries of `input` that are objects are as in the protocols of Jina and Prediction Guard.
    """

    modality: Modality = Field("text", description="What strings in `input` are.")
    input: Annotated[list[Content], Several] | None = Field(
        None, description="Texts, images, or objects with a text, an image or both, which get one vector together."
    )
    messages: Annotated[list[Message], Field(min_length=1, max_length=1)] | None = None
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: of little-endian float32.")
    dimensions: None = Field(None, description="Not possible: the vectors mean something only as a whole.")
    embedding_type: Literal["float", "base64"] | None = Field(None, description="Jina's `encoding_format`.")
    task: str | None = Field(None, max_length=1000, description="Accepted because Jina's clients send it; not used.")
    normalized: bool = Field(True, description="Likewise: the vectors have length one in any case.")
    truncation_direction: Literal["right"] = Field("right", description="Texts are cut at their end, in any case.")

    @field_validator("input", mode="before", json_schema_input_type=_Entries)
    @classmethod
    def _entries(cls, given: Any, info: ValidationInfo) -> Any:
        several = [given] if isinstance(given, str | dict) else given
        if not isinstance(several, list):
            return several
        if several and isinstance(several[0], int | list):
            raise ValueError(
                "token ids, which are another tokenizer's; expected texts (in LangChain: "
                "OpenAIEmbeddings(check_embedding_ctx_length=False))"
            )
        return [{info.data.get("modality", "text"): one} if isinstance(one, str) else one for one in several]

    @field_validator("dimensions", mode="before")
    @classmethod
    def _whole(cls, given: Any) -> None:
        if given is not None:
            raise ValueError("this model was not trained for shortened vectors; leave it out")

    @field_validator("truncation_direction", mode="before")
    @classmethod
    def _at_the_end(cls, given: Any) -> Any:
        return given.lower() if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise ValueError("expected either input or messages")
        self.contents()
        return self

    def contents(self) -> list[Content]:
        """Returns what gets a vector each."""
        if self.messages is None:
            return self.input or []
        given = self.messages[0].content
        parts = [TextPart(type="text", text=given)] if isinstance(given, str) else given
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        images = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        if len(texts) > 1 or len(images) > 1:
            raise ValueError("a message has several texts or images; expected at most one of each")
        return [Content(text=next(iter(texts), None), image=next(iter(images), None))]


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


@router.post("/v1/embeddings", response_model=Listed[Embedding], responses=COMPUTING, tags=["embeddings"])
async def embeddings(body: EmbeddingsRequest, service: Served) -> Response:
    """Turn texts, images, or an image and a text together into vectors.

    Vectors of texts and of images can be compared. What is comparable with the joint vector of an image and a text is
    another joint vector.
    """
    param, contents = "messages" if body.messages else "input", body.contents()
    joint = all(one.image is not None and one.text is not None for one in contents)
    sources = {number: one.image for number, one in enumerate(contents) if one.image is not None}
    words = [one.text or "" for one in contents]
    with service.admission(len(contents), param, body.model, None if joint else "embeddings", images=sources.values()):
        numbers = None if len(contents) == 1 else list(sources)
        decoded = await service.inputs.images(list(sources.values()), param, numbers=numbers)
        images = dict(zip(sources, decoded, strict=True))
        ids = await service.inputs.texts(words, param, truncate=body.truncate)
        texts = {number: ids[number] for number, one in enumerate(contents) if one.text is not None}
        items = [
            Item(image=images[number].pixels if number in images else None, ids=texts.get(number))
            for number in range(len(contents))
        ]
        vectors = await service.batcher.submit(items)

    def content() -> dict[str, Any]:
        if (body.embedding_type or body.encoding_format) == "float":
            written = [vector.tolist() for vector in vectors]
        else:
            written = [base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode() for vector in vectors]
        rows = [{"object": "embedding", "index": n, "embedding": vector} for n, vector in enumerate(written)]
        return listed(rows, service.name, service.main.tokens(decoded, list(texts.values())))

    return await json_of(content, sum(vector.numel() for vector in vectors))


class Document(Content):
    """A text or an image."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if (self.text is None) == (self.image is None):
            raise ValueError("expected either text or image")
        return self


def _document(given: Any) -> Any:
    if isinstance(given, str):
        return {"image" if is_image(given) else "text": given}
    return given


TextOrImage = Annotated[Document, BeforeValidator(_document, json_schema_input_type=str | Document)]
"""A text, the data URI of an image, or either by name."""


_RERANK = [
    {"query": "a red square", "documents": [{"image": IMAGE}]},
    {"query": "a red square", "documents": ["two dogs in the snow", "a square in red"], "top_n": 1},
]


class RerankRequest(Body, json_schema_extra={"examples": _RERANK}):
    """A query and documents, which are all texts or all images."""

    query: TextOrImage
    documents: Annotated[list[TextOrImage], Several]
    top_n: int | None = Field(None, ge=1, description="Results to return; all of them if left out.")
    return_documents: bool = Field(False, description="Repeat the documents in the results.")
    max_tokens_per_doc: int | None = Field(
        None, ge=1, strict=True, description="Cohere's client sends it; not used: `truncate` cuts documents."
    )


class Result(BaseModel):
    index: int = Field(description="Its number in the request.")
    relevance_score: float
    document: Document | None = None


class RerankResponse(BaseModel):
    """Documents, the most relevant first."""

    model: str
    scored_by: Literal["matching", "cosine"] = Field(
        description="How well text and image match, as of `/v1/match`, or the cosine of two texts or of two images."
    )
    results: list[Result]
    usage: Usage


@router.post("/rerank", include_in_schema=False)
@router.post("/v2/rerank", include_in_schema=False)
@router.post("/v1/rerank", response_model=RerankResponse, responses=COMPUTING, tags=["rerank"])
async def rerank(body: RerankRequest, service: Served) -> Response:
    """Sort documents by their relevance to a query.

    A text is matched with images, and an image with texts, by the whole model. Texts are compared with a text, and
    images with an image, by the cosine of their vectors.
    """
    kinds = {document.text is None for document in body.documents}
    if len(kinds) > 1:
        message = "documents are texts and images, whose scores cannot be compared; send two requests"
        raise ApiError(400, message, param="documents")
    by_image, same = body.query.text is None, {body.query.text is None} == kinds
    given = {
        param: [one.text or one.image or "" for one in some]
        for param, some in (("query", [body.query]), ("documents", body.documents))
    }
    images = [one.image for one in (body.query, *body.documents)]
    use: Literal["embeddings", "match"] = "embeddings" if same else "match"
    with service.admission(len(body.documents) + same, "documents", body.model, use, images=images):
        if same:
            if by_image:
                read = [one for p in given for one in await service.inputs.images(given[p], p)]
                items, tokens = [Item(image=image.pixels) for image in read], service.main.tokens(read, [])
            else:
                truncate = body.truncate
                ids = [one for p in given for one in await service.inputs.texts(given[p], p, truncate=truncate)]
                items, tokens = [Item(ids=one) for one in ids], service.main.tokens([], ids)
            first, *vectors = await service.batcher.submit(items)
            scores = [float(first @ vector) for vector in vectors]
        else:
            params = ("query", "documents") if by_image else ("documents", "query")
            pictures, words = (given[param] for param in params)
            log_odds, tokens = await service.pairs(
                "match", pictures, words, all_pairs=True, params=params, truncate=body.truncate
            )
            scores = service.main.predictor.reranking.match(torch.tensor(log_odds)).tolist()
    order = sorted(range(len(scores)), key=lambda number: -scores[number])[: body.top_n]

    def content() -> dict[str, Any]:
        results = [
            {
                "index": number,
                "relevance_score": scores[number],
                "document": body.documents[number].model_dump(exclude_none=True) if body.return_documents else None,
            }
            for number in order
        ]
        scored_by = "cosine" if same else "matching"
        return {"model": service.name, "scored_by": scored_by, "results": results, "usage": usage(tokens)}

    return await json_of(content, sum(map(len, given["documents"])) if body.return_documents else len(order))
