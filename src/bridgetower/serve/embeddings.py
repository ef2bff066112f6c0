"""`POST /v1/embeddings` in OpenAI's protocol, and `/v1/rerank` in that of Jina and Cohere; both take images too."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal, Self

from annotated_types import Len
from fastapi import APIRouter, Response
from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator
from torch import Tensor

from bridgetower.inference import Tokens
from bridgetower.processor import Resized
from bridgetower.serve.config import MOST_ITEMS
from bridgetower.serve.errors import ApiError
from bridgetower.serve.inputs import is_image
from bridgetower.serve.schemas import (
    COMPUTING,
    IMAGE,
    Body,
    JsonRoute,
    Listed,
    Modality,
    Strings,
    Text,
    Usage,
    json_of,
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

        url: str = Field(description="Data URI.")

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


_PARTS = [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": "a red square"}]
_EMBEDDINGS = [
    {"input": ["two dogs in the snow", "a red square"]},
    {"input": IMAGE, "modality": "image"},
    {"messages": [{"role": "user", "content": _PARTS}], "encoding_format": "base64"},
]


class EmbeddingsRequest(Body, json_schema_extra={"examples": _EMBEDDINGS}):
    """Texts or images, each of which gets a vector, or one message whose image and text get one together."""

    input: Strings | None = Field(None, description="Texts, or data URIs of images.")
    messages: Annotated[list[Message], Field(min_length=1, max_length=1)] | None = None
    modality: Modality = Field("text", description="What `input` holds.")
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: of little-endian float32.")
    dimensions: None = Field(None, description="Not possible: the vectors mean something only as a whole.")

    @field_validator("input", mode="before")
    @classmethod
    def _no_token_ids(cls, given: Any) -> Any:
        if isinstance(given, list) and given and isinstance(given[0], int | list):
            raise ValueError(
                "token ids, which are another tokenizer's; expected texts (in LangChain: "
                "OpenAIEmbeddings(check_embedding_ctx_length=False))"
            )
        return given

    @field_validator("dimensions", mode="before")
    @classmethod
    def _whole(cls, given: Any) -> None:
        if given is not None:
            raise ValueError("this model was not trained for shortened vectors; leave it out")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise ValueError("expected either input or messages")
        if self.messages and (len(self.messages[0].texts) > 1 or len(self.messages[0].images) > 1):
            raise ValueError("a message has several texts or images; expected at most one of each")
        return self

    @property
    def sources(self) -> tuple[list[str], list[str]]:
        """Images and texts."""
        if self.messages is not None:
            return self.messages[0].images, self.messages[0].texts
        given = self.input or []
        return (given, []) if self.modality == "image" else ([], given)


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

    Vectors of texts and of images can be compared. What is comparable with the joint vector of a message is the joint
    vector of another.
    """
    param = "messages" if body.messages else "input"
    uris, words = body.sources
    joint = bool(uris and words)
    count = 1 if joint else len(uris) + len(words)
    with service.admission(count, param, body.model, None if joint else "embeddings", images=uris):
        images = await service.inputs.images(uris, param)
        texts = await service.inputs.texts(words, param, truncate=body.truncate) if words else []
        vectors = await service.batcher.submit(embedding_items(images, texts, joint=joint))
    data = [
        Embedding(index=number, embedding=_encoded(vector, body.encoding_format))
        for number, vector in enumerate(vectors)
    ]
    usage = Usage.of(service.main.tokens(images, texts))
    return json_of(EmbeddingsResponse(data=data, model=service.name, usage=usage))


def _encoded(vector: Tensor, encoding: Literal["float", "base64"]) -> list[float] | str:
    if encoding == "float":
        return list(vector.tolist())
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()


class Document(BaseModel, extra="forbid"):
    """A text or an image."""

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
        description="The probability that text and image match, or the cosine of two texts or of two images."
    )
    results: list[Result]
    usage: Usage


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
    params = ("documents", "query") if body.query.modality == "text" else ("query", "documents")
    images, texts = (body.contents[param] for param in params)
    given = PairInputs(images=images, texts=texts, all_pairs=True, params=params)
    return await service.pairs("match", given, truncate=body.truncate)


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
