"""Inputs of the model from those of a request: images from base64, token ids from texts."""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate, groupby, pairwise
from typing import TypeVar

from bridgetower.distributed import available_cores
from bridgetower.inference import Tokens
from bridgetower.processor import Processor, Resized
from bridgetower.serve.decoding import Decoders
from bridgetower.serve.errors import ApiError
from bridgetower.serve.queues import Turn, Turns
from bridgetower.serve.remote import RemoteImages

IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGP4z8CAFWEXHbQSACj/P8Fu7N9hAAAAAElF"
    "TkSuQmCC"
)
"""A red square, for examples."""

MAX_CHARACTERS = 20_000
"""Of one text. Models take far fewer; longer texts would be tokenised only to be refused or cut."""

MAX_CHARACTERS_TOGETHER = 2**22
"""Of all texts of one field of a request."""

_BASE64 = 2**20  # characters that are decoded at once; meanwhile no other thread of Python runs
_AT_ONCE = 2000  # characters that are tokenised in less time than handing them to a thread takes
_SLICE = 40_000  # characters, or texts of one more, that are tokenised in one piece of a thread's work

_BARE = re.compile(r"(?:/9j/|[A-Za-z0-9+])[A-Za-z0-9+/]{31}")  # of a path, the first letter is no slash
_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII | re.IGNORECASE)
_URL = re.compile(r"https?://", re.IGNORECASE)
_SHOWN = 40

_Result = TypeVar("_Result")


class Inputs:
    """Prepares images and texts in threads of its own, so that the event loop stays free."""

    def __init__(self, processor: Processor, decoders: Decoders, *, remote: RemoteImages | None = None) -> None:
        self._processor, self.decoders, self._remote = processor, decoders, remote
        self._threads = Turns(available_cores(), "inputs", time.monotonic)  # work is done in other processes too

    def warm(self) -> None:
        """Starts a decoder, and the tokenizer's threads: without memory for them later it would fail for ever."""
        self._processor.token_ids(["a"] * 2)
        self.prepared(base64.b64decode(IMAGE.partition(",")[2]))

    def fetches(self, sources: Iterable[str | None]) -> bool:
        """Whether one of some images is fetched from another host."""
        return self._remote is not None and any(_URL.match(source) for source in sources if source is not None)

    def prepared(self, content: bytes) -> Resized:
        """Decodes an image's file and brings it to the model's size."""
        return self._processor.prepare(content, decode=self.decoders.open)

    async def images(
        self, sources: Sequence[str], param: str, *, numbers: Sequence[int] | None = None
    ) -> list[Resized]:
        """Decodes images and brings them to the model's size."""
        return await self.decoded(self.prepared, sources, param, numbers=numbers)

    async def decoded(
        self,
        decode: Callable[[bytes], _Result],
        sources: Sequence[str],
        param: str,
        *,
        numbers: Sequence[int] | None = None,
    ) -> list[_Result]:
        """Decodes images; errors name them by their numbers in the field."""
        if numbers is None and len(sources) != 1:
            numbers = range(len(sources))
        params = [param] if numbers is None else [f"{param}.{number}" for number in numbers]
        with self._threads.turn() as turn:
            jobs = [
                asyncio.ensure_future(self._decoded(turn, decode, *source))
                for source in zip(sources, params, strict=True)
            ]
            try:
                return await asyncio.gather(*jobs)
            finally:
                for job in jobs:
                    job.cancel()

    async def _decoded(self, turn: Turn, decode: Callable[[bytes], _Result], source: str, param: str) -> _Result:
        try:
            if self._remote is not None and _URL.match(source):
                async with self._remote.fetched(source) as content:
                    return await self._threads.run(turn, lambda: decode(content))
            return await self._threads.run(turn, lambda: decode(_content(source)))
        except (ValueError, OSError) as error:
            raise ApiError(400, f"{param}: {error}", param=param, code="invalid_image") from error

    async def texts(self, texts: Sequence[str], param: str, *, truncate: bool) -> list[Tokens]:
        """Tokenises texts."""
        longest, together = max(map(len, texts)), sum(map(len, texts))
        if longest > MAX_CHARACTERS:
            message = f"{param}: a text has {longest} characters, the limit is {MAX_CHARACTERS}"
            raise ApiError(400, message, param=param)
        if together > MAX_CHARACTERS_TOGETHER:
            message = f"{param}: {together} characters, the limit is {MAX_CHARACTERS_TOGETHER}; send several requests"
            raise ApiError(413, message, param=param)

        def tokenised(start: int, end: int) -> list[list[int]]:
            return self._processor.token_ids(texts[start:end], truncate=truncate, first=start)

        try:
            if together <= _AT_ONCE:
                found = [tokenised(0, len(texts))]
            else:
                ends = enumerate(accumulate(map(len, texts)))
                starts = [next(group)[0] for _, group in groupby(ends, lambda end: end[1] // _SLICE)]
                found = await self.each(*(partial(tokenised, *part) for part in pairwise([*starts, len(texts)])))
        except ValueError as error:
            message = str(error).replace(", or pass truncate=True to cut it", ', or send "truncate": true to cut it')
            raise ApiError(400, f"{param}: {message}", param=param) from error
        return [tuple(ids) for part in found for ids in part]

    async def each(self, *works: Callable[[], _Result]) -> list[_Result]:
        """Runs functions that decode something, in threads, in turn with other requests."""
        with self._threads.turn() as turn:
            return await asyncio.gather(*(self._threads.run(turn, work) for work in works))

    def close(self) -> None:
        """Ends the threads without waiting for work that was begun."""
        self._threads.close()
        self.decoders.close()
        if self._remote is not None:
            self._remote.close()


def _content(source: str) -> bytes:
    found = _DATA_URI.match(source)
    if found is None and _BARE.match(source) is None:
        shown = source if len(source) <= _SHOWN else source[:_SHOWN] + "…"
        raise ValueError(
            f"an image is given as {shown!r}; expected a data URI, data:image/png;base64,…, or its base64: paths are "
            "never read, and URLs only at hosts that the server was told to allow"
        )
    content = bytearray()
    try:
        for start in range(found.end() if found else 0, len(source), _BASE64):
            part, last = source[start : start + _BASE64], start + _BASE64 >= len(source)
            if part.endswith("=") and not last:
                raise ValueError("Excess data after padding")
            content += base64.b64decode(part, validate=True)
    except ValueError as error:
        raise ValueError(f"the base64 of an image is damaged ({error})") from error
    return bytes(content)


def is_image(source: str) -> bool:
    """Whether a string is the data URI of an image, damaged or not, and not a text."""
    return _DATA_URI.match(source) is not None
