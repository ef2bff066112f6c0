"""`POST /v1/embeddings`: OpenAI's protocol, with pictures and with picture and text together."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal, Self

from annotated_types import Len
from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from bridgetower.inference import Item
from bridgetower.serve.bodies import JsonRoute
from bridgetower.serve.config import MOST_ITEMS
from bridgetower.serve.schemas import (
    COMPUTING,
    PICTURE,
    Body,
    Listed,
    Modality,
    Strings,
    Text,
    Truncate,
    Usage,
    json_of,
)
from bridgetower.serve.service import Served

router = APIRouter(route_class=JsonRoute, tags=["embeddings"])


class TextPart(BaseModel):
    """Text of a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: Text


class ImagePart(BaseModel):
    """Picture of a message."""

    class Url(BaseModel):
        """Where it is."""

        url: str = Field(description="Data URI.")

    model_config = ConfigDict(extra="forbid")

    type: Literal["image_url"]
    image_url: Url


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(BaseModel):
    """A message with at most one picture and one text."""

    model_config = ConfigDict(extra="forbid")

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
        """Its pictures."""
        if isinstance(self.content, str):
            return []
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


class EmbeddingsRequest(Body):
    """Texts or pictures, each of which gets a vector, or one message whose picture and text get one together."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"input": ["two dogs in the snow", "a red square"]},
                {"input": PICTURE, "modality": "image"},
                {
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "image_url", "image_url": {"url": PICTURE}},
                                {"type": "text", "text": "a red square"},
                            ],
                        }
                    ],
                    "encoding_format": "base64",
                },
            ]
        }
    )

    input: Strings | None = Field(None, description="Texts, or data URIs of pictures.")
    messages: Annotated[list[Message], Field(min_length=1, max_length=1)] | None = None
    modality: Modality = Field("text", description="What `input` holds.")
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: of little-endian float32.")
    dimensions: None = Field(None, description="Not possible: the vectors mean something only as a whole.")
    truncate: Truncate = False

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
            raise ValueError("a message has several texts or pictures; expected at most one of each")
        return self

    @property
    def sources(self) -> tuple[list[str], list[str]]:
        """Pictures and texts."""
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


@router.post("/v1/embeddings", response_model=EmbeddingsResponse, responses=COMPUTING)
async def embeddings(body: EmbeddingsRequest, service: Served) -> Response:
    """Turn texts, pictures, or a picture and a text together into vectors.

    Vectors of texts and of pictures can be compared. What is comparable with the joint vector of a message is the joint
    vector of another.
    """
    param = "messages" if body.messages else "input"
    pictures, words = body.sources
    joint = bool(pictures and words)
    with service.admission(1 if joint else len(pictures) + len(words), param, body.model):
        if not joint:
            service.check_use("embeddings")
        images = await service.inputs.images(pictures, param)
        texts = await service.inputs.texts(words, param, truncate=body.truncate) if words else []
        if joint:
            items = [Item(image=images[0].pixels, ids=texts[0])]
        else:
            items = [*(Item(image=image.pixels) for image in images), *(Item(ids=ids) for ids in texts)]
        vectors = await service.batcher.submit(items)
    data = [
        Embedding(index=number, embedding=_encoded(vector, body.encoding_format))
        for number, vector in enumerate(vectors)
    ]
    usage = Usage.of(service.tokens(images, texts))
    return json_of(EmbeddingsResponse(data=data, model=service.name, usage=usage))


def _encoded(vector: Tensor, encoding: Literal["float", "base64"]) -> list[float] | str:
    if encoding == "float":
        return list(vector.tolist())
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
