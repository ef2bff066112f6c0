"""What all requests and responses share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Generic, Literal, TypeVar

from annotated_types import Len
from fastapi import Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from bridgetower.files import visible
from bridgetower.serve.config import MOST_ITEMS, MOST_TOP
from bridgetower.serve.errors import ApiError
from bridgetower.serve.inputs import MAX_CHARACTERS

PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGP4z8CAFWEXHbQSACj/P8Fu7N9hAAAAAElF"
    "TkSuQmCC"
)
"""A red square, for examples."""


_AT_ONCE = 1000  # parts of an answer that are built in less time than anybody notices
_NAME = 4096  # characters; a model may be named by its path


class Body(BaseModel):
    """A request; a field that would be ignored is an error."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(
        None,
        max_length=_NAME,
        description="Name of the model, as `/v1/models` has it; the one that serves it if left out.",
    )
    user: str | None = Field(
        None, max_length=_NAME, description="Taken for the sake of OpenAI's clients; nothing is done with it."
    )


class Usage(BaseModel):
    """What a request took: positions that the towers read, those of padding not counted."""

    prompt_tokens: int = Field(description="Tokens of texts, and for each picture its patches and one more.")
    total_tokens: int = Field(description="The same: nothing is generated.")

    @classmethod
    def of(cls, tokens: int) -> Usage:
        """Returns the usage of a request that read so many."""
        return cls(prompt_tokens=tokens, total_tokens=tokens)


_Entry = TypeVar("_Entry")


class Listed(BaseModel, Generic[_Entry]):
    """A response with an entry per input."""

    object: Literal["list"] = "list"
    data: list[_Entry]
    model: str = Field(description="That answered.")
    usage: Usage


class Error(BaseModel):
    """An error, as OpenAI's API reports it."""

    class Details(BaseModel):
        """What went wrong."""

        message: str = Field(description="One line: given, expected, what to do.")
        type: str
        param: str | None = Field(description="The field of the request.")
        code: str | None = Field(description="For programs.")

    error: Details


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns the responses of a route that may fail like this, for OpenAPI."""
    return {status: {"model": Error, "description": _REASONS[status]} for status in statuses}


_REASONS = {
    400: "The request is not valid.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The request was not sent in time.",
    413: "The body is too large, or there are too many items.",
    429: "The queue is full; `Retry-After` says when to come back.",
    503: "It took too long, or the server is not ready.",
}

COMPUTING = errors(400, 401, 404, 408, 413, 429, 503)
"""Errors of every route that asks the model."""


def _several(given: object) -> object:
    return [given] if isinstance(given, str) else given


Text = Annotated[str, Len(max_length=MAX_CHARACTERS)]
_Several = Len(1, MOST_ITEMS)

Strings = Annotated[
    list[str], _Several, BeforeValidator(_several, json_schema_input_type=str | Annotated[list[str], _Several])
]
"""A string or several, as a list."""

Texts = Annotated[
    list[Text], _Several, BeforeValidator(_several, json_schema_input_type=Text | Annotated[list[Text], _Several])
]
"""A text or several, as a list."""

Pictures = Annotated[Strings, Field(description="Data URI of a picture, or several.")]
Modality = Literal["text", "image"]
Top = Annotated[int, Field(ge=1, le=MOST_TOP)]
Truncate = Annotated[bool, Field(description="Cut texts that are too long instead of refusing them.")]


def num_pairs(images: list[str], texts: list[str], *, all_pairs: bool = False) -> int:
    """Returns how many pairs `paired` builds.

    Raises:
        ApiError: The numbers of images and texts differ.
    """
    if all_pairs:
        return len(images) * len(texts)
    if len(images) != len(texts):
        raise ApiError(400, f"{len(images)} images and {len(texts)} texts; expected as many of one as of the other")
    return len(images)


def paired(images: list[str], texts: list[str], *, all_pairs: bool = False) -> list[tuple[int, int]]:
    """Returns which image goes with which text: the first with the first, or every one with every one.

    Raises:
        ApiError: The numbers of images and texts differ.
    """
    if all_pairs:
        return [(image, text) for image in range(len(images)) for text in range(len(texts))]
    return [(number, number) for number in range(num_pairs(images, texts))]


async def long_json_of(build: Callable[[], BaseModel], parts: int) -> Response:
    """Returns what `json_of` returns; if it has many parts, it is built outside the event loop.

    Args:
        build: Returns the content.
        parts: That the content has.
    """
    if parts <= _AT_ONCE:
        return json_of(build())
    return await asyncio.to_thread(lambda: json_of(build()))


def json_of(content: BaseModel) -> Response:
    """Returns a response that is already what its route declares, so that it is not checked once more."""
    text = content.model_dump_json(exclude_none=True)
    return Response(text if text.isascii() else visible(text), media_type="application/json")
