"""Inputs of the model from fields of a request: pixels from images, token ids from texts."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate, chain, groupby, pairwise
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
_MAX_FIELD_CHARACTERS = 2**22  # of all texts of one field of a request
# Characters that are decoded at once; meanwhile no other thread of Python runs.
_BASE64_BLOCK = 2**20
_AT_ONCE = 2000  # characters that are tokenised in less time than handing them to a thread takes
# Characters, or texts of one more, that a thread tokenises before another request has its turn.
_SLICE = 40_000

# The first letter of a path is a slash.
_BARE = re.compile(r"(?:/9j/|[A-Za-z0-9+])[A-Za-z0-9+/]{31}")
_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII | re.IGNORECASE)
_URL = re.compile(r"https?://", re.IGNORECASE)
_SHOWN = 40  # characters of a source in an error

_Result = TypeVar("_Result")


class Decoders:
    """Processes that decode untrusted images with limited memory and time. One that exceeds them is replaced."""

    def __init__(self, *, max_pixels: int, memory: int) -> None:
        self.memory = memory
        self._command = [sys.executable, "-P", images.__file__, str(max_pixels), str(memory)]
        self._idle: deque[Popen[bytes]] = deque()
        self.processes: set[Popen[bytes]] = set()
        self._closed = False

    def open(
        self, content: bytes, side: int | None = None, **options: Any
    ) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]]:
        """Decodes as `open_reduced`, with a ValueError also for an image that takes too much memory or time."""
        try:
            process = self._idle.popleft()
        except IndexError:
            process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        job = {"length": len(content), "side": side, "background": None, "fit": None, **options}
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
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
                self._idle.append(self._start())
            limit = f"{self.memory // 10**6} MB"
            if status == -signal.SIGPROF:
                seconds = f"{images.SECONDS:g} s"
                limit = f"{seconds} + {images.SECONDS_PER_MEGAPIXEL:g} s per million pixels"
            raise ValueError(
                f"the image takes more than {limit} to decode; save it in another way"
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

    def _start(self) -> Popen[bytes]:
        try:
            process = Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Threads of OpenBLAS, which is not used, would take memory.
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        except OSError as error:  # for which the image is not to blame
            raise RuntimeError(f"no process can be started to decode images: {error}") from error
        self.processes.add(process)
        return process


class Inputs:
    """Prepares images and texts in threads of its own, so that the event loop stays free."""

    def __init__(
        self, processor: Processor, decoders: Decoders, *, remote: RemoteImages | None = None
    ) -> None:
        self._processor = processor
        self.decoders = decoders
        self._remote = remote
        # A clock on the wall, because other processes work too.
        self._threads = Turns(available_cores(), "inputs", time.monotonic)

    def warm(self) -> None:
        """Starts a decoder and the tokenizer's threads: if memory lacked for them later, they would never start."""
        self._processor.token_ids(["a"] * 2)
        self.prepared(base64.b64decode(IMAGE.partition(",")[2]))

    def fetches(self, sources: Iterable[str | None]) -> bool:
        """Tells whether an image is fetched from another host."""
        return self._remote is not None and any(_URL.match(source or "") for source in sources)

    def prepared(self, content: bytes) -> Resized:
        return self._processor.prepare(content, decode=self.decoders.open)

    async def images(self, sources: Sequence[str | None], param: str) -> list[Pixels | None]:
        """Decodes images and resizes them for the model. None stays."""
        return await self.decoded(lambda content: self.prepared(content).pixels, sources, param)

    async def decoded(
        self, decode: Callable[[bytes], Any], sources: Sequence[str | None], param: str
    ) -> list[Any]:
        """Applies a function to the files of images. Errors name images by their indices in the field."""
        is_single = len(sources) == 1
        with self._threads.turn() as turn:
            jobs = {
                index: asyncio.ensure_future(
                    self._decoded(turn, decode, source, param if is_single else f"{param}.{index}")
                )
                for index, source in enumerate(sources)
                if source is not None
            }
            try:
                await asyncio.gather(*jobs.values())
            finally:
                for job in jobs.values():
                    job.cancel()
        return [jobs[index].result() if index in jobs else None for index in range(len(sources))]

    async def _decoded(
        self, turn: RequestJobs[Any], decode: Callable[[bytes], Any], source: str, param: str
    ) -> Any:
        try:
            if self._remote is not None and _URL.match(source):
                async with self._remote.fetched(source) as content:
                    return await self._threads.run(turn, lambda: decode(content))
            return await self._threads.run(turn, lambda: decode(_file_of(source)))
        except (ValueError, OSError) as error:
            message = f"{param}: {error}"
            raise ApiError(400, message, param=param, code="invalid_image") from error

    async def texts(self, texts: Sequence[str], param: str, *, truncate: bool) -> list[Tokens]:
        lengths = [len(text) for text in texts]
        num_characters = sum(lengths)
        longest = max(lengths)
        if longest > MAX_CHARACTERS:
            message = f"{param}: a text has {longest} characters, the limit is {MAX_CHARACTERS}"
            raise ApiError(400, message, param=param)
        if num_characters > _MAX_FIELD_CHARACTERS:
            message = f"{param}: {num_characters} characters, the limit is {_MAX_FIELD_CHARACTERS}"
            raise ApiError(413, f"{message}; send several requests", param=param)

        def tokenise(start: int, end: int) -> list[list[int]]:
            return self._processor.token_ids(texts[start:end], truncate=truncate, first=start)

        try:
            if num_characters <= _AT_ONCE:
                slices = [tokenise(0, len(texts))]
            else:
                ends = enumerate(accumulate(lengths))
                groups = groupby(ends, lambda end: end[1] // _SLICE)
                starts = [next(group)[0] for _, group in groups]
                ranges = pairwise([*starts, len(texts)])
                slices = await self.each(*(partial(tokenise, *limits) for limits in ranges))
        except ValueError as error:
            message = str(error).replace(
                ", or pass truncate=True to cut it", ', or send "truncate": true to cut it'
            )
            raise ApiError(400, f"{param}: {message}", param=param) from error
        return [tuple(ids) for ids in chain.from_iterable(slices)]

    async def items(self, contents: Sequence[Any], param: str, *, truncate: bool) -> list[Item]:
        """Prepares entries of a field, each a text, an image, or both to be embedded together."""
        images = await self.images([content.image for content in contents], param)
        texts = [content.text or "" for content in contents]
        token_ids = await self.texts(texts, param, truncate=truncate)
        return [
            Item(image=image, ids=None if content.text is None else ids)
            for content, image, ids in zip(contents, images, token_ids, strict=True)
        ]

    async def each(self, *functions: Callable[[], _Result]) -> list[_Result]:
        """Runs functions that decode something, in threads, in turn with other requests."""
        with self._threads.turn() as turn:
            return await asyncio.gather(*(self._threads.run(turn, work) for work in functions))

    def close(self) -> None:
        self._threads.close()
        self.decoders.close()
        if self._remote is not None:
            self._remote.close()


def _file_of(source: str) -> bytes:
    """Decodes a data URI, or base64 alone, in blocks between which other threads run."""
    prefix = _DATA_URI.match(source)
    if prefix is None and _BARE.match(source) is None:
        excerpt = source if len(source) <= _SHOWN else source[:_SHOWN] + "…"
        raise ValueError(
            f"an image is given as {excerpt!r}; expected a data URI, data:image/png;base64,…, or its base64: paths are "
            "never read, and URLs only at hosts that --allow-host names"
        )
    content = bytearray()
    try:
        for start in range(prefix.end() if prefix else 0, len(source), _BASE64_BLOCK):
            end = start + _BASE64_BLOCK
            if source[start:end].endswith("=") and end < len(source):
                raise ValueError("Excess data after padding")
            content += base64.b64decode(source[start:end], validate=True)
    except ValueError as error:
        raise ValueError(f"the base64 of an image is damaged ({error})") from error
    return bytes(content)


def is_data_uri(source: str) -> bool:
    """Tells whether a string is the data URI of an image, damaged or not, and not a text."""
    return _DATA_URI.match(source) is not None
