"""Inputs of the model from those of a request: images from base64, token ids from texts."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate, groupby, pairwise
from subprocess import Popen
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8

from bridgetower.distributed import available_cores
from bridgetower.inference.items import Item, Pixels, Tokens
from bridgetower.processor import Processor, Resized, images
from bridgetower.serve.errors import ApiError
from bridgetower.serve.fairness import RequestJobs
from bridgetower.serve.queues import Turns
from bridgetower.serve.remote import RemoteImages

IMAGE = (  # a red square, for examples
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGP4z8CAFWEXHbQSACj/P8Fu7N9hAAAAAElF"
    "TkSuQmCC"
)

MAX_CHARACTERS = 20_000  # of one text; models take far fewer
_TOGETHER = 2**22  # characters of all texts of one field of a request
_BASE64 = 2**20  # characters that are decoded at once; meanwhile no other thread of Python runs
_AT_ONCE = 2000  # characters that are tokenised in less time than handing them to a thread takes
# characters, or texts of one more, that are tokenised in one piece of a thread's work
_SLICE = 40_000

# of a path, the first letter is no slash
_BARE = re.compile(r"(?:/9j/|[A-Za-z0-9+])[A-Za-z0-9+/]{31}")
_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII | re.IGNORECASE)
_URL = re.compile(r"https?://", re.IGNORECASE)
_SHOWN = 40

_Result = TypeVar("_Result")


class Decoders:
    """Processes that decode images from outside, each with so many bytes of memory; one that takes more is replaced."""

    def __init__(self, *, max_pixels: int, memory: int) -> None:
        self.memory = memory
        self._command = [sys.executable, "-P", images.__file__, str(max_pixels), str(memory)]
        self._idle: deque[Popen[bytes]] = deque()
        self.processes: set[Popen[bytes]] = set()
        self._closed = False

    def open(
        self, content: bytes, side: int | None = None, **options: Any
    ) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]]:
        """Decodes as `open_reduced`; a ValueError also says that an image takes too much memory or time."""
        try:
            process = self._idle.popleft()
        except IndexError:
            process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        job = json.dumps(
            {"length": len(content), "side": side, "background": None, "fit": None, **options}
        )
        try:
            process.stdin.write(job.encode() + b"\n")
            process.stdin.write(content)
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            pixels = np.empty(answer.get("shape", 0), np.uint8)
            if process.stdout.readinto(pixels.data.cast("B")) < pixels.size:  # type: ignore[attr-defined]
                raise EOFError
        except (OSError, EOFError, ValueError) as error:
            self.processes.discard(process)
            status = process.wait()
            if not self._closed:
                self._idle.append(self._started())
            most = f"{self.memory // 10**6} MB"
            if status == -signal.SIGPROF:
                most = (
                    f"{images.SECONDS:g} s + {images.SECONDS_PER_MEGAPIXEL:g} s per million pixels"
                )
            raise ValueError(
                f"the image takes more than {most} to decode; save it in another way"
            ) from error
        self._idle.append(process)
        if "error" in answer:
            raise ValueError(answer["error"])
        return pixels, tuple(answer["size"])

    def close(self) -> None:
        self._closed = True
        for process in list(self.processes):
            process.kill()
            process.wait()

    def _started(self) -> Popen[bytes]:
        try:
            process = Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:  # of which the image is not to blame
            raise RuntimeError(f"no process can be started to decode images: {error}") from error
        self.processes.add(process)
        return process


class Inputs:
    """Prepares images and texts in threads of its own, so that the event loop stays free."""

    def __init__(
        self, processor: Processor, decoders: Decoders, *, remote: RemoteImages | None = None
    ) -> None:
        self._processor, self.decoders, self._remote = processor, decoders, remote
        # work is done in other processes too
        self._threads = Turns(available_cores(), "inputs", time.monotonic)

    def warm(self) -> None:
        """Starts a decoder, and the tokenizer's threads: without memory for them later it would fail for ever."""
        self._processor.token_ids(["a"] * 2)
        self.prepared(base64.b64decode(IMAGE.partition(",")[2]))

    def fetches(self, sources: Iterable[str | None]) -> bool:
        """Whether one of some images is fetched from another host."""
        return self._remote is not None and any(
            _URL.match(source) for source in sources if source is not None
        )

    def prepared(self, content: bytes) -> Resized:
        return self._processor.prepare(content, decode=self.decoders.open)

    async def images(self, sources: Sequence[str | None], param: str) -> list[Pixels | None]:
        """Decodes images and brings them to the model's size; None in the place of one stays."""
        return await self.decoded(lambda content: self.prepared(content).pixels, sources, param)

    async def decoded(
        self, decode: Callable[[bytes], Any], sources: Sequence[str | None], param: str
    ) -> list[Any]:
        """Decodes images; errors name them by their numbers in the field."""

        async def one(turn: RequestJobs[Any], source: str, param: str) -> Any:
            try:
                if self._remote is not None and _URL.match(source):
                    async with self._remote.fetched(source) as content:
                        return await self._threads.run(turn, lambda: decode(content))
                return await self._threads.run(turn, lambda: decode(_content(source)))
            except (ValueError, OSError) as error:
                raise ApiError(
                    400, f"{param}: {error}", param=param, code="invalid_image"
                ) from error

        params = (
            [param]
            if len(sources) == 1
            else [f"{param}.{number}" for number in range(len(sources))]
        )
        with self._threads.turn() as turn:
            jobs = [
                asyncio.ensure_future(one(turn, source, param))
                for source, param in zip(sources, params, strict=True)
                if source is not None
            ]
            try:
                images = iter(await asyncio.gather(*jobs))
            finally:
                for job in jobs:
                    job.cancel()
        return [None if source is None else next(images) for source in sources]

    async def texts(self, texts: Sequence[str], param: str, *, truncate: bool) -> list[Tokens]:
        longest, together = max(map(len, texts)), sum(map(len, texts))
        if longest > MAX_CHARACTERS:
            message = f"{param}: a text has {longest} characters, the limit is {MAX_CHARACTERS}"
            raise ApiError(400, message, param=param)
        if together > _TOGETHER:
            message = (
                f"{param}: {together} characters, the limit is {_TOGETHER}; send several requests"
            )
            raise ApiError(413, message, param=param)

        def tokenised(start: int, end: int) -> list[list[int]]:
            return self._processor.token_ids(texts[start:end], truncate=truncate, first=start)

        try:
            if together <= _AT_ONCE:
                found = [tokenised(0, len(texts))]
            else:
                ends = enumerate(accumulate(map(len, texts)))
                starts = [
                    next(group)[0] for _, group in groupby(ends, lambda end: end[1] // _SLICE)
                ]
                found = await self.each(
                    *(partial(tokenised, *part) for part in pairwise([*starts, len(texts)]))
                )
        except ValueError as error:
            message = str(error).replace(
                ", or pass truncate=True to cut it", ', or send "truncate": true to cut it'
            )
            raise ApiError(400, f"{param}: {message}", param=param) from error
        return [tuple(ids) for part in found for ids in part]

    async def items(self, contents: Sequence[Any], param: str, *, truncate: bool) -> list[Item]:
        """Prepares entries of a field, each a text, an image, or both to be embedded together."""
        images = await self.images([one.image for one in contents], param)
        texts = await self.texts([one.text or "" for one in contents], param, truncate=truncate)
        return [
            Item(image=image, ids=None if one.text is None else ids)
            for one, image, ids in zip(contents, images, texts, strict=True)
        ]

    async def each(self, *works: Callable[[], _Result]) -> list[_Result]:
        """Runs functions that decode something, in threads, in turn with other requests."""
        with self._threads.turn() as turn:
            return await asyncio.gather(*(self._threads.run(turn, work) for work in works))

    def close(self) -> None:
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
            "never read, and URLs only at hosts that --allow-host names"
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
