"""Routes for embeddings, as OpenAI's, and for reranking, as Jina's and Cohere's."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from fastapi import APIRouter, Response
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from bridgetower.inference.items import Item
from bridgetower.serve.costs import Unit
from bridgetower.serve.errors import ApiError
from bridgetower.serve.inputs import IMAGE, is_data_uri
from bridgetower.serve.schemas import (
    COMPUTING,
    Body,
    JsonRoute,
    ListResponse,
    Modality,
    Several,
    Source,
    Text,
    Usage,
    as_list,
    json_of,
    usage,
)
from bridgetower.serve.service import Served, Service

router = APIRouter(route_class=JsonRoute, responses=COMPUTING)


class TextPart(BaseModel, extra="forbid"):
    type: Literal["text"]
    text: Text


class Url(BaseModel):
    url: Source


class ImagePart(BaseModel, extra="forbid"):
    type: Literal["image_url"]
    image_url: Url


Parts = Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Several]


class Message(BaseModel, extra="forbid"):
    """A message with at most one image and one text."""

    role: Literal["user"]
    content: Text | Parts


class Content(BaseModel, extra="forbid"):
    """A text, an image, or both."""

    text: str | None = None
    image: Source | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_object(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("expected a string, or an object with text, image or both")
        return value

    @model_validator(mode="after")
    def _has_fields(self) -> Self:
        if self.text is None and self.image is None:
            raise ValueError("expected text, image or both")
        return self

    @property
    def unit(self) -> Unit:
        if self.image is None:
            return "text"
        return "image" if self.text is None else "pair"


TruncationDirection = Annotated[Literal["right"], BeforeValidator(lambda value: str(value).lower())]
_Contents = str | Content | Annotated[list[str | Content], Several]
_PARTS = [
    {"type": "image_url", "image_url": {"url": IMAGE}},
    {"type": "text", "text": "a red square"},
]
_EMBEDDINGS = [
    {"input": ["two dogs in the snow", "a red square"]},
    {"input": IMAGE, "modality": "image"},
    {"input": [{"text": "a red square", "image": IMAGE}, {"text": "a red square"}]},
    {"messages": [{"role": "user", "content": _PARTS}], "encoding_format": "base64"},
]


class EmbeddingsRequest(Body, json_schema_extra={"examples": _EMBEDDINGS}):
    """Texts, images, or images with texts, which get a vector each, or one message, whose parts get one together."""

    modality: Modality = Field("text", description="What strings in `input` are.")
    input: Annotated[list[Content], Several] | None = Field(
        None,
        description="Texts, images, or objects with a text, an image or both, which get one vector together.",
    )
    messages: Annotated[list[Message], Field(min_length=1, max_length=1)] | None = None
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="base64: of little-endian float32."
    )
    dimensions: None = Field(None, description="Not possible.")
    embedding_type: Literal["float", "base64", "binary", "ubinary"] | None = Field(
        None,
        description="Jina's `encoding_format`; binary: signs, eight in an int8, ubinary: in an uint8.",
    )
    task: str | None = Field(
        None, max_length=1000, description="Accepted because Jina's clients send it; not used."
    )
    normalized: bool = Field(True, description="Likewise: the vectors have length one in any case.")
    truncation_direction: TruncationDirection = "right"

    @field_validator("input", mode="before", json_schema_input_type=_Contents)
    @classmethod
    def _entries_as_objects(cls, value: Any, info: ValidationInfo) -> Any:
        entries = as_list(value)
        if not isinstance(entries, list):
            return entries
        if entries and isinstance(entries[0], int | list):
            raise ValueError(
                "token ids, which are another tokenizer's; expected texts (in LangChain: "
                "OpenAIEmbeddings(check_embedding_ctx_length=False))"
            )
        modality = info.data.get("modality", "text")
        return [{modality: entry} if isinstance(entry, str) else entry for entry in entries]

    @field_validator("dimensions", mode="before")
    @classmethod
    def _has_no_dimensions(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("this model was not trained for shortened vectors; leave it out")

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise ValueError("expected either input or messages")
        self.contents()
        return self

    def contents(self) -> list[Content]:
        """Returns the inputs, which a message has as one."""
        if self.messages is None:
            return self.input or []
        content = self.messages[0].content
        if isinstance(content, str):
            return [Content(text=content)]
        texts = [element.text for element in content if isinstance(element, TextPart)]
        images = [element.image_url.url for element in content if isinstance(element, ImagePart)]
        if len(texts) > 1 or len(images) > 1:
            raise ValueError("a message has several texts or images; expected at most one of each")
        return [Content(text=next(iter(texts), None), image=next(iter(images), None))]


def _packed_signs(vector: torch.Tensor) -> np.ndarray:
    return np.packbits(vector.numpy() > 0)


_VECTOR_FORMS: dict[str, Callable[[torch.Tensor], list[float] | str]] = {
    "float": lambda vector: vector.tolist(),
    "base64": lambda vector: base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode(),
    "ubinary": lambda vector: _packed_signs(vector).tolist(),
    "binary": lambda vector: (_packed_signs(vector) ^ 128).view(np.int8).tolist(),
}


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


async def embed_contents(
    service: Service, body: Body, contents: Sequence[Content], param: str
) -> tuple[list[Item], list[torch.Tensor]]:
    """Computes a vector for each text, image, or image with a text."""
    images = [content.image for content in contents]
    work = Counter(content.unit for content in contents)
    head = None if set(work) == {"pair"} else "itc"
    with service.admission(work, param, body.model, head, images=images):
        items = await service.main.items(contents, param, truncate=body.truncate)
        return items, await service.scheduler.submit(items)


@router.post("/v1/embeddings", response_model=ListResponse[Embedding], tags=["embeddings"])
async def embeddings(body: EmbeddingsRequest, service: Served) -> Response:
    """Turn texts and images into vectors that can be compared, or an image and a text together into a joint vector."""
    param = "messages" if body.messages else "input"
    items, vectors = await embed_contents(service, body, body.contents(), param)
    form = _VECTOR_FORMS[body.embedding_type or body.encoding_format]
    rows = (
        {"object": "embedding", "index": index, "embedding": form(vector)}
        for index, vector in enumerate(vectors)
    )
    return await service.list_response(rows, items)


class Document(Content):
    """A text or an image."""

    @model_validator(mode="after")
    def _has_fields(self) -> Self:
        if (self.text is None) == (self.image is None):
            raise ValueError("expected either text or image")
        return self


def _document(value: Any) -> Any:
    if isinstance(value, str):
        return {"image" if is_data_uri(value) else "text": value}
    return value


TextOrImage = Annotated[Document, BeforeValidator(_document, json_schema_input_type=str | Document)]
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
        None, ge=1, strict=True, description="Of Cohere's client; not used."
    )


class Result(BaseModel):
    index: int = Field(description="Its number in the request.")
    relevance_score: float
    document: Document | None = None


ScoredBy = Literal["matching", "cosine"]


class RerankResponse(BaseModel):
    """Documents, the most relevant first."""

    model: str
    scored_by: ScoredBy = Field(description="By `/v1/match`, or between two of one kind.")
    results: list[Result]
    usage: Usage


async def score_documents(
    service: Service,
    body: Body,
    queries: Sequence[Content],
    documents: Sequence[Content],
    param: str,
) -> tuple[list[float], ScoredBy, list[Item]]:
    """Computes the relevance of each document to the one query, or to the query with its index.

    The whole model matches texts with images. Texts among themselves, and images, are compared by their vectors.
    """
    query_units = {query.unit for query in queries}
    document_units = {document.unit for document in documents}
    if len(query_units) > 1 or len(document_units) > 1:
        raise ApiError(
            400,
            f"{param} are texts and images, whose scores cannot be compared; send two requests",
            param=param,
        )
    are_alike = query_units == document_units
    contents = [*queries, *documents]
    images = [content.image for content in contents]
    work: dict[Unit, int] = {"pair": len(documents)}
    if are_alike:
        work = {contents[0].unit: len(contents)}

    model = service.main
    head = "itc" if are_alike else "itm"
    with service.admission(work, param, body.model, head, images=images):
        query_items = await model.items(queries, "query", truncate=body.truncate)
        document_items = await model.items(documents, param, truncate=body.truncate)
        if are_alike:
            items = [*query_items, *document_items]
        else:
            if len(query_items) == 1:
                query_items = query_items * len(document_items)
            items = [
                Item(
                    kind="match",
                    image=query.image if query.ids is None else document.image,
                    ids=query.ids or document.ids,
                )
                for query, document in zip(query_items, document_items, strict=True)
            ]
        outcomes = await service.scheduler.submit(items)

    if not are_alike:
        scores = model.predictor.reranking.match(torch.tensor(outcomes))
        return scores.tolist(), "matching", items
    vectors = torch.stack(outcomes)
    cosines = (vectors[: len(queries)] * vectors[len(queries) :]).sum(dim=-1)
    return cosines.clamp(-1, 1).tolist(), "cosine", items  # rounding may exceed 1


@router.post("/v2/rerank", include_in_schema=False)
@router.post("/v1/rerank", response_model=RerankResponse, tags=["rerank"])
async def rerank(body: RerankRequest, service: Served) -> Response:
    """Sort documents by their relevance to a query: by the whole model, or texts among themselves by their vectors."""
    scores, scored_by, items = await score_documents(
        service, body, [body.query], body.documents, "documents"
    )
    results = []
    for index in best_first(scores)[: body.top_n]:
        result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
        if body.return_documents:
            result["document"] = body.documents[index].model_dump(exclude_none=True)
        results.append(result)
    response = {
        "model": service.main.name,
        "scored_by": scored_by,
        "results": results,
        "usage": usage(service.main.tokens(items)),
    }
    return await json_of(service.writers, response)


def best_first(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda index: -scores[index])
