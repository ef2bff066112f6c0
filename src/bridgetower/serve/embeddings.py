"""`POST /v1/embeddings` in OpenAI's protocol, and `/v1/rerank` in that of Jina and Cohere; both take images too."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal, Self

import torch
from annotated_types import Len
from fastapi import APIRouter, Response
from pydantic import BaseModel, BeforeValidator, Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from bridgetower.inference import Item, Tokens
from bridgetower.processor import Resized
from bridgetower.serve.config import MOST_ITEMS
from bridgetower.serve.errors import ApiError
from bridgetower.serve.inputs import IMAGE, is_image
from bridgetower.serve.schemas import (
    COMPUTING,
    Body,
    JsonRoute,
    Listed,
    Modality,
    Source,
    Text,
    Usage,
    long_json_of,
)
from bridgetower.serve.service import PairInputs, Served, Service, embedding_items

router = APIRouter(route_class=JsonRoute)


class TextPart(BaseModel, extra="forbid"):
    """Text of a message."""

    type: Literal["text"]
    text: Text


class ImagePart(BaseModel, extra="forbid"):
    """Image of a message."""

    class Url(BaseModel):
        """Where it is."""

        url: Source

    type: Literal["image_url"]
    image_url: Url


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(BaseModel, extra="forbid"):
    """A message with at most one image and one text."""

    role: Literal["user"]
    content: Text | Annotated[list[Part], Len(1, MOST_ITEMS)]

    @property
    def texts(self) -> list[str]:
        """Its texts."""
        if isinstance(self.content, str):
            return [self.content]
        return [part.text for part in self.content if isinstance(part, TextPart)]

    @property
    def images(self) -> list[str]:
        """Its images."""
        if isinstance(self.content, str):
            return []
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


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


_Entry = str | Content
_Entries = _Entry | Annotated[list[_Entry], Len(1, MOST_ITEMS)]


class EmbeddingsRequest(Body, json_schema_extra={"examples": _EMBEDDINGS}):
    """Texts, images, or images with texts, each of which gets a vector; or one message, whose parts get one together.

    Entries of `input` that are objects are as in the protocols of Jina and Prediction Guard.
    """

    modality: Modality = Field("text", description="What strings in `input` are.")
    input: Annotated[list[Content], Len(1, MOST_ITEMS)] | None = Field(
        None, description="Texts, images, or objects with a text, an image or both, which get one vector together."
    )
    messages: Annotated[list[Message], Field(min_length=1, max_length=1)] | None = None
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: of little-endian float32.")
    dimensions: None = Field(None, description="Not possible: the vectors mean something only as a whole.")
    embedding_type: Literal["float", "base64"] | None = Field(
        None, description="Jina's name of `encoding_format`, which it overrides."
    )
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
        if self.messages and (len(self.messages[0].texts) > 1 or len(self.messages[0].images) > 1):
            raise ValueError("a message has several texts or images; expected at most one of each")
        return self

    @property
    def contents(self) -> list[Content]:
        """What gets a vector each."""
        if self.messages is None:
            return self.input or []
        (message,) = self.messages
        return [Content(text=next(iter(message.texts), None), image=next(iter(message.images), None))]


class Embedding(BaseModel):
    """A vector."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsResponse(Listed[Embedding]):
    """A vector of length one for every input, in their order."""


@router.post("/v1/embeddings", response_model=EmbeddingsResponse, responses=COMPUTING, tags=["embeddings"])
async def embeddings(body: EmbeddingsRequest, service: Served) -> Response:
    """Turn texts, images, or an image and a text together into vectors.

    Vectors of texts and of images can be compared. What is comparable with the joint vector of an image and a text is
    another joint vector.
    """
    param, contents = "messages" if body.messages else "input", body.contents
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

    def content() -> EmbeddingsResponse:
        data = [
            Embedding(index=number, embedding=_encoded(vector, body.embedding_type or body.encoding_format))
            for number, vector in enumerate(vectors)
        ]
        usage = Usage.of(service.main.tokens(decoded, list(texts.values())))
        return EmbeddingsResponse(data=data, model=service.name, usage=usage)

    return await long_json_of(content, sum(vector.numel() for vector in vectors))


def _encoded(vector: Tensor, encoding: Literal["float", "base64"]) -> list[float] | str:
    if encoding == "float":
        return list(vector.tolist())
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()


class Document(Content):
    """A text or an image."""

    @model_validator(mode="after")
    def _some(self) -> Self:
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
    documents: Annotated[list[TextOrImage], Len(1, MOST_ITEMS)]
    top_n: int | None = Field(None, ge=1, description="Results to return; all of them if left out.")
    return_documents: bool = Field(False, description="Repeat the documents in the results.")
    max_tokens_per_doc: int | None = Field(
        None,
        ge=1,
        strict=True,
        description="Accepted because Cohere's client sends it; not used: `truncate` cuts documents.",
    )

    @property
    def contents(self) -> dict[str, list[str]]:
        """Texts or data URIs, by field: the query and the documents."""
        return {"query": [self.query.content], "documents": [document.content for document in self.documents]}


class Result(BaseModel):
    """A document."""

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
    modalities = {document.modality for document in body.documents}
    if len(modalities) > 1:
        message = "documents are texts and images, whose scores cannot be compared; send two requests"
        raise ApiError(400, message, param="documents")
    same = body.query.modality in modalities
    count = len(body.documents) + same
    images = [document.image for document in (body.query, *body.documents)]
    with service.admission(count, "documents", body.model, "embeddings" if same else "match", images=images):
        scores, tokens = await (_cosines if same else _matches)(body, service)
    order = sorted(range(len(scores)), key=lambda number: -scores[number])[: body.top_n]

    def content() -> RerankResponse:
        results = [
            Result(
                index=number,
                relevance_score=scores[number],
                document=body.documents[number] if body.return_documents else None,
            )
            for number in order
        ]
        scored_by: Literal["matching", "cosine"] = "cosine" if same else "matching"
        return RerankResponse(model=service.name, scored_by=scored_by, results=results, usage=Usage.of(tokens))

    length = sum(len(document.content) for document in body.documents) if body.return_documents else len(order)
    return await long_json_of(content, length)


async def _matches(body: RerankRequest, service: Service) -> tuple[list[float], int]:
    params = ("documents", "query") if body.query.modality == "text" else ("query", "documents")
    images, texts = (body.contents[param] for param in params)
    given = PairInputs(images=images, texts=texts, all_pairs=True, params=params)
    log_odds, tokens = await service.pairs("match", given, truncate=body.truncate)
    return service.main.predictor.reranking.match(torch.tensor(log_odds)).tolist(), tokens


async def _cosines(body: RerankRequest, service: Service) -> tuple[list[float], int]:
    images: list[Resized] = []
    texts: list[Tokens] = []
    for param, contents in body.contents.items():
        if body.query.modality == "text":
            texts += await service.inputs.texts(contents, param, truncate=body.truncate)
        else:
            images += await service.inputs.images(contents, param)
    first, *vectors = await service.batcher.submit(embedding_items(images, texts, joint=False))
    return [float(first @ vector) for vector in vectors], service.main.tokens(images, texts)
