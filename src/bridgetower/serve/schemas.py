"""Fields and errors that all routes share, and JSON that is read and written without stopping the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import Annotated, Any, Generic, Literal, TypeVar

from annotated_types import Len
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic_core import to_json

from bridgetower.serve.config import MOST_ITEMS, MOST_TOP
from bridgetower.serve.errors import ApiError, invalid_request
from bridgetower.serve.inputs import MAX_CHARACTERS
from bridgetower.serve.queues import Turns

_AT_ONCE = 64  # pieces of a response that the event loop itself writes
_NAME = 4096  # characters; a model may be named by its path

_Entry = TypeVar("_Entry")


class Body(BaseModel, extra="forbid"):
    """Fields of every request, none of which is ignored."""

    model: str | None = Field(
        None, max_length=_NAME, description="As `/v1/models` has it; by default what serves it."
    )
    user: str | None = Field(
        None, max_length=_NAME, description="Accepted because OpenAI's clients send it; not used."
    )
    truncate: bool = Field(
        False, description="Cut texts that are too long instead of refusing them."
    )


class Usage(BaseModel):
    """Positions that the towers read for a request, without padding."""

    prompt_tokens: int = Field(
        description="Tokens of texts, and for each image its patches and one more."
    )
    total_tokens: int = Field(description="The same: nothing is generated.")


class ListResponse(BaseModel, Generic[_Entry]):
    """A response with an entry per input."""

    object: Literal["list"] = "list"
    data: list[_Entry]
    model: str = Field(description="That answered.")
    usage: Usage


class Details(BaseModel):
    message: str = Field(description="One line: given, expected, what to do.")
    type: str
    param: str | None = Field(description="The field of the request.")
    code: str | None = Field(description="For programs.")


class Error(BaseModel):
    error: Details


_ERRORS = {
    400: "The request is not valid.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The request was not sent in time.",
    413: "The body is too large, or there are too many items.",
    429: "The queue is full; `Retry-After` has the seconds to wait.",
    503: "It took too long, the server is not ready, or the index cannot be read.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Error, "description": _ERRORS[status]} for status in statuses}


COMPUTING = errors(*_ERRORS)
"""Errors of every route that uses the model."""

PROBABILITY = Field(
    None, description="That text and image match; only of what was matched, by a calibrated model."
)
SCORE = Field(
    None,
    description="Of the matching head, from 0 to 1; instead of a probability without a calibration.",
)

Text = Annotated[str, Len(max_length=MAX_CHARACTERS)]
Source = Annotated[str, Field(description="An image: a data URI, or the base64 in it alone.")]
Modality = Literal["text", "image"]
Top = Annotated[int, Field(ge=1, le=MOST_TOP)]
Several = Len(1, MOST_ITEMS)


def as_list(value: object) -> object:
    """Returns a list of one string or object, and other values as they are."""
    return [value] if isinstance(value, str | dict) else value


Texts = Annotated[
    list[Text],
    Several,
    BeforeValidator(as_list, json_schema_input_type=Text | Annotated[list[Text], Several]),
]
Images = Annotated[
    list[Source],
    Several,
    BeforeValidator(as_list, json_schema_input_type=Source | Annotated[list[Source], Several]),
]


def usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def listed(rows: Iterable[Mapping[str, Any]], model: str, tokens: int) -> dict[str, Any]:
    return {"object": "list", "data": iter(rows), "model": model, "usage": usage(tokens)}


class AsciiResponse(JSONResponse):
    """JSON in ASCII, so that no character of it is invisible."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


async def json_of(writers: Turns, value: object) -> Response:
    """Returns a value as JSON without fields that are None. Threads write a long one."""
    pieces = _json_pieces(value)
    content = [*islice(pieces, _AT_ONCE)]
    if len(content) == _AT_ONCE:
        content += await writers.drawn(pieces)
    return Response(b"".join(content), media_type="application/json")


def _json_pieces(value: Any) -> Iterator[bytes]:
    """Yields JSON in short pieces: while one is written, no other thread of Python runs."""
    is_nested = isinstance(value, list) and value and isinstance(value[0], list | Mapping)
    if isinstance(value, Mapping):
        opening = "{"
        for name, field in value.items():
            if field is not None:
                yield f'{opening}"{name}":'.encode()
                yield from _json_pieces(field)
                opening = ","
        yield b"{}" if opening == "{" else b"}"
    elif isinstance(value, Iterator) or is_nested:
        opening = "["
        for entry in value:
            yield opening.encode()
            yield from _json_pieces(entry)
            opening = ","
        yield b"[]" if opening == "[" else b"]"
    else:
        yield _json(value)


def _json(value: object) -> bytes:
    with suppress(ValueError):  # half a surrogate pair
        if (text := to_json(value)).isascii():  # six times as fast
            return text
    return json.dumps(value, default=vars, separators=(",", ":")).encode()


# Limits of a body.
STRINGS = 2**15  # with names of fields
OUTSIDE = 2**18  # bytes outside of strings, such as numbers, without white space
# Bytes in strings with an escape or a character outside ASCII, which data URIs have not.
TEXT = 2**23

_BYTES_AT_ONCE = 2**14  # that are parsed in less time than handing them to a thread takes
_BLOCK = 2**16  # bytes

# One thread: while it parses, no other thread of Python runs.
_PARSER = ThreadPoolExecutor(1, thread_name_prefix="bodies")


class JsonRoute(APIRoute):
    """A route whose body is parsed and validated outside the event loop."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        respond = super().get_route_handler()
        if self.body_field is None:
            return respond
        model: TypeAdapter[Any] = TypeAdapter(self.body_field.field_info.annotation or Any)

        async def parse_and_respond(request: Request) -> Response:
            # Starlette's `Request.json` returns `_json`; without it, it would parse the body again.
            if body := await request.body():
                if len(body) <= _BYTES_AT_ONCE:
                    request._json = parse(model, body)
                else:
                    loop = asyncio.get_running_loop()
                    request._json = await loop.run_in_executor(_PARSER, parse, model, body)
            return await respond(request)

        return parse_and_respond


def parse(model: TypeAdapter[Any], body: bytes) -> Any:
    check_effort(body)
    try:
        return model.validate_json(body)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False, include_input=False)) from None


def check_effort(body: bytes) -> None:
    """Checks that a body parses quickly, in small steps between which other threads run."""
    num_strings = outside = text = 0
    in_string = False
    length = 0  # of the string
    is_plain = True  # as far as it was read: ASCII without escapes
    remainder = b""
    for start in range(0, len(body), _BLOCK):
        # A block without half escapes, whose only quotes are at the ends of strings.
        block = remainder + body[start : start + _BLOCK]
        num_backslashes = len(block) - len(block.rstrip(b"\\"))
        end = len(block) - num_backslashes % 2
        remainder = block[end:]
        masked = block[:end].replace(rb"\\", rb"\-").replace(rb"\"", rb"\-")
        for index, piece in enumerate(masked.split(b'"')):
            if index > 0:  # after a quote
                text += 0 if is_plain else length
                num_strings += in_string
                in_string = not in_string
                is_plain = True
                length = 0
            if in_string:
                length += len(piece)
                is_plain = is_plain and piece.isascii() and b"\\" not in piece
            else:
                outside += len(piece.translate(None, b" \t\r\n"))

        text_so_far = text if is_plain else text + length
        for count, limit, unit in (
            (num_strings, STRINGS, "strings"),
            (outside, OUTSIDE, "bytes outside of strings"),
            (text_so_far, TEXT, "bytes in strings with escapes or characters outside ASCII"),
        ):
            if count > limit:
                raise ApiError(413, f"the body has more than {limit} {unit}; send several requests")
