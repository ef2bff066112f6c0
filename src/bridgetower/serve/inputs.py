"""Inputs of the model from those of a request: images from base64, token ids from texts."""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

from PIL import Image

from bridgetower.attention import view_of
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

OR_CUT = ', or send "truncate": true to cut it'
"""Ends the error about a text that is too long."""

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

    async def images(
        self, sources: Sequence[str], param: str, *, numbers: Sequence[int] | None = None
    ) -> list[Resized]:
        """Decodes images and brings them to the model's size."""
        if numbers is None and len(sources) != 1:
            numbers = range(len(sources))
        params = [param] if numbers is None else [f"{param}.{number}" for number in numbers]
        with self._threads.turn() as turn:
            jobs = [
                asyncio.ensure_future(self._usable(turn, *source, self.prepared))
                for source in zip(sources, params, strict=True)
            ]
            try:
                return await asyncio.gather(*jobs)
            finally:
                for job in jobs:
                    job.cancel()

    async def texts(self, texts: Sequence[str], param: str, *, truncate: bool) -> list[Tokens]:
        """Tokenises texts."""
        longest, together = max(map(len, texts)), sum(map(len, texts))
        if longest > MAX_CHARACTERS:
            message = f"{param}: a text has {longest} characters, the limit is {MAX_CHARACTERS}"
            raise ApiError(400, message, param=param)
        if together > MAX_CHARACTERS_TOGETHER:
            message = f"{param}: {together} characters, the limit is {MAX_CHARACTERS_TOGETHER}; send several requests"
            raise ApiError(413, message, param=param)
        if together <= _AT_ONCE:
            return self._texts(texts, param, truncate, 0)
        starts = [0]
        size = 0
        for number, text in enumerate(texts):
            if size + len(text) > _SLICE:
                starts.append(number)
                size = 0
            size += len(text)
        slices = zip(starts, [*starts[1:], len(texts)], strict=True)
        works = [partial(self._texts, texts[start:end], param, truncate, start) for start, end in slices if start < end]
        return [ids for found in await self.each(works) for ids in found]

    async def seen(self, source: str, param: str, *, view: bool) -> tuple[Resized, Image.Image | None]:
        """Decodes an image as `images` does, and if asked to also returns the part that the model sees, for display."""

        def decoded(content: bytes) -> tuple[Resized, Image.Image | None]:
            if not view:
                return self.prepared(content), None
            whole, _ = self.decoders.open(content, background=self._processor.config.background)
            return self.prepared(content), view_of(self._processor, Image.fromarray(whole))

        with self._threads.turn() as turn:
            return await self._usable(turn, source, param, decoded)

    async def in_thread(self, work: Callable[[], _Result]) -> _Result:
        """Runs a function that decodes something, in a thread."""
        with self._threads.turn() as turn:
            return await self._threads.run(turn, work)

    async def each(self, works: Sequence[Callable[[], _Result]]) -> list[_Result]:
        """Runs functions that decode something, in threads, in turn with other requests."""
        with self._threads.turn() as turn:
            return await asyncio.gather(*(self._threads.run(turn, work) for work in works))

    def close(self) -> None:
        """Ends the threads without waiting for work that was begun."""
        self._threads.close()
        self.decoders.close()
        if self._remote is not None:
            self._remote.close()

    async def _usable(self, turn: Turn, source: str, param: str, decoded: Callable[[bytes], _Result]) -> _Result:
        """Runs a function that decodes, on the content of an image."""
        try:
            if self._remote is not None and _URL.match(source):
                async with self._remote.fetched(source) as content:
                    return await self._threads.run(turn, lambda: decoded(content))
            return await self._threads.run(turn, lambda: decoded(_content(source)))
        except (ValueError, OSError) as error:
            raise ApiError(400, f"{param}: {error}", param=param, code="invalid_image") from error

    def prepared(self, content: bytes) -> Resized:
        """Decodes an image's file and brings it to the model's size."""
        return self._processor.prepare(content, decode=self.decoders.open)

    def _texts(self, texts: Sequence[str], param: str, truncate: bool, first: int) -> list[Tokens]:
        try:
            return [tuple(ids) for ids in self._processor.token_ids(texts, truncate=truncate, first=first)]
        except ValueError as error:
            message = str(error).replace(", or pass truncate=True to cut it", OR_CUT)
            raise ApiError(400, f"{param}: {message}", param=param) from error


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
