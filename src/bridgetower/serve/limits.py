"""How much a request may send and how long it may take."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bridgetower.serve.errors import ApiError, failure

logger = logging.getLogger(__name__)

_BODIES = 8  # of the largest size that are held at once


class Limits:
    """Reads the body of a request within limits, then lets the application answer it in time.

    A request whose client leaves is dropped: what it still waits for is not computed.
    """

    def __init__(self, app: ASGIApp, *, max_body: int, timeout: float) -> None:
        """Wraps an application.

        Args:
            app: What answers.
            max_body: Bytes of one body.
            timeout: Seconds for a whole request.
        """
        self._app, self._max_body, self._timeout = app, max_body, timeout
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or says why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytearray()
        with self._holding(body):
            error = await self._answered(scope, body, receive, send)
        if error is not None:
            await error.response()(scope, receive, send)

    async def _answered(self, scope: Scope, body: bytearray, receive: Receive, send: Send) -> ApiError | None:
        """Answers a request; returns an error if nothing was sent yet."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        try:
            async with asyncio.timeout_at(deadline):
                if not await self._read(Headers(scope=scope), body, receive):
                    return None
        except TimeoutError:
            return ApiError(408, f"the request was not sent within {self._timeout:g} s; send less, or faster")
        except ApiError as error:
            return error
        return await self._in_time(scope, bytes(body), receive, _Started(send), deadline)

    async def _in_time(
        self, scope: Scope, body: bytes, receive: Receive, send: _Started, deadline: float
    ) -> ApiError | None:
        """Lets the application answer; it is cancelled at the deadline, and when the client leaves."""
        left = False
        try:
            async with asyncio.timeout_at(deadline) as limit:
                watching = asyncio.ensure_future(_end_when_left(receive, limit))
                try:
                    await self._app(scope, _replay(body), send)
                finally:
                    left = watching.done()
                    watching.cancel()
        except Exception as error:
            if left or send.started:
                return None
            if isinstance(error, TimeoutError) and limit.expired():
                message = f"no answer within {self._timeout:g} s; try again later"
                return ApiError(503, message, headers={"Retry-After": "10"})
            logger.exception("%s %s failed", scope["method"], scope["path"])
            return failure()
        return None

    async def _read(self, headers: Headers, body: bytearray, receive: Receive) -> bool:
        """Reads the body; False if the client left.

        Raises:
            ApiError: It is too large, or too many others are being read.
        """
        announced = headers.get("content-length", "0")
        self._check(int(announced) if announced.isdecimal() else 0)
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            part = message.get("body", b"")
            body += part
            self._held += len(part)
            self._check(len(body))
            if not message.get("more_body"):
                return True

    def _check(self, size: int) -> None:
        if size > self._max_body:
            message = f"the body is larger than {self._max_body} bytes; send several requests, or smaller pictures"
            raise ApiError(413, message)
        if self._held > _BODIES * self._max_body:
            raise ApiError(429, "too many large requests at once; try again in a second", headers={"Retry-After": "1"})

    @contextmanager
    def _holding(self, body: bytearray) -> Iterator[None]:
        """Gives back in the end what the body took of what may be held."""
        try:
            yield
        finally:
            self._held -= len(body)


class _Started:
    """Sends, and knows whether anything was sent."""

    def __init__(self, send: Send) -> None:
        self._send, self.started = send, False

    async def __call__(self, message: Message) -> None:
        self.started = True
        await self._send(message)


def _replay(body: bytes) -> Receive:
    """Returns what hands an application a body that was read."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()  # until it is cancelled: whether the client left is looked after elsewhere
        raise AssertionError

    return receive


async def _end_when_left(receive: Receive, limit: asyncio.Timeout) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    limit.reschedule(asyncio.get_running_loop().time())
