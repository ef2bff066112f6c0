"""Bodies of requests: parsed where they hold nobody up, and only if that takes little time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError

from bridgetower.serve.errors import ApiError, invalid_request

STRINGS = 2**15
"""Most strings in a body, names of fields included."""

OUTSIDE = 2**18
"""Most bytes of a body outside of strings: numbers, brackets and commas; white space is not counted."""

TEXT = 2**23
"""Most bytes in strings with an escape or a character outside ASCII; data URIs have neither."""

_AT_ONCE = 2**14  # bytes that are parsed in less time than handing them to a thread takes
_PART = 2**16
_PARSER = ThreadPoolExecutor(1, thread_name_prefix="bodies")  # one: while it parses, no other thread of Python runs


class JsonRoute(APIRoute):
    """A route whose body is parsed and validated outside the event loop."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns what answers a request."""
        answer = super().get_route_handler()
        if self.body_field is None:
            return answer
        model: TypeAdapter[Any] = TypeAdapter(self.body_field.field_info.annotation or Any)

        async def parse_and_answer(request: Request) -> Response:
            if body := await request.body():
                request = _Parsed(request, body, await _parsed(model, body))
            return await answer(request)

        return parse_and_answer


class _Parsed(Request):
    """A request whose body is a model already."""

    def __init__(self, request: Request, body: bytes, content: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._given, self._content = body, content

    async def body(self) -> bytes:
        return self._given

    async def json(self) -> Any:
        return self._content


async def _parsed(model: TypeAdapter[Any], body: bytes) -> Any:
    if len(body) <= _AT_ONCE:
        return parse(model, body)
    return await asyncio.get_running_loop().run_in_executor(_PARSER, parse, model, body)


def parse(model: TypeAdapter[Any], body: bytes) -> Any:
    """Returns what a body of JSON holds.

    Raises:
        ApiError: It is not what the model expects, or parsing would take too long.
    """
    check_effort(body)
    try:
        return model.validate_json(body)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False, include_input=False)) from None


def check_effort(body: bytes) -> None:
    """Checks that a parser has little to do, in small steps between which other threads run.

    Long strings cost little. What costs is many values, and strings that cannot be copied as they are.

    Raises:
        ApiError: It has too much to do.
    """
    strings = outside = text = size = 0
    inside, plain = False, True
    for part in _parts(body):
        for number, piece in enumerate(part.split(b'"')):
            if number:
                text += 0 if plain else size
                strings += inside
                inside, plain, size = not inside, True, 0
            if inside:
                size += len(piece)
                plain = plain and piece.isascii() and b"\\" not in piece
            else:
                outside += len(piece.translate(None, b" \t\r\n"))
        if strings > STRINGS:
            raise _too_much(f"{STRINGS} strings")
        if outside > OUTSIDE:
            raise _too_much(f"{OUTSIDE} bytes outside of strings")
        if text + (0 if plain else size) > TEXT:
            raise _too_much(f"{TEXT} bytes in strings with escapes or characters outside ASCII")


def _parts(body: bytes) -> Iterator[bytes]:
    """Yields a body in parts that end with no half of an escape, and in which quotes are the ends of strings only."""
    rest = b""
    for start in range(0, len(body), _PART):
        part = rest + body[start : start + _PART]
        end = len(part) - (len(part) - len(part.rstrip(b"\\"))) % 2
        rest = part[end:]
        yield part[:end].replace(rb"\\", rb"\-").replace(rb"\"", rb"\-")


def _too_much(limit: str) -> ApiError:
    return ApiError(413, f"the body has more than {limit}; send several requests")
