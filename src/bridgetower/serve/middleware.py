"""Limits on what every request may take."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Hashable
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bridgetower.serve.access import client_of
from bridgetower.serve.errors import ApiError, failed
from bridgetower.serve.fairness import CLIENT, Shares
from bridgetower.serve.queues import Starts

HEAD_BYTES = 2**16  # at most, of the head of a request
_DRAIN = 5.0  # seconds for which the rest of a body is read after its response
_CHUNKS, _CHUNK = 256, 1024  # chunks that any body may have; bytes of a body for each chunk more
_REQUESTS = 1000  # with bodies, that are read or answered at once
_BODIES = 8  # of the largest size that are held at once, and as many bytes of answers
_BUSY = (
    429  # status of what is refused because others, or the client itself, have asked for too much
)
_PAUSE, _LONGEST_PAUSE = 0.05, 10.0  # seconds, for each refusal of a client that waits, and at most
_OWN = 2**16  # bytes of a body, or of an answer, for which there is always room


class RequestLimitsMiddleware:
    """Limits the body of a request, the time for its response, and the responses that clients have not yet read.

    Clients share the room for requests and for bodies. Stalled ones are disconnected when others need the room: of too
    many requests, the one whose body has been arriving for longest; of too many bytes of responses, the one that is
    read most slowly. GET and HEAD, and the first 64 KiB of a body, always have room. Of a client that disconnects,
    queued items are not computed.
    """

    def __init__(
        self, app: ASGIApp, *, max_body: int, timeout: float, requests: int = _REQUESTS
    ) -> None:
        self._app, self._max_body, self.timeout = app, max_body, timeout
        self.most_bytes = _BODIES * max_body
        self._requests, self._bytes = Shares(requests), Shares(self.most_bytes)
        self._reading: dict[
            asyncio.Timeout, Hashable
        ] = {}  # clients whose bodies arrive, longest on its way first
        self._starts = Starts()
        self._refused = Shares(math.inf)
        self.answers: set[_Answer] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, headers, body = scope["method"], Headers(scope=scope), bytearray()
        deadline = asyncio.get_running_loop().time() + self.timeout
        client = client_of(scope)
        CLIENT.set(client)
        try:
            if method in ("GET", "HEAD"):
                if _has_body(headers):
                    message = f"{method} has a body, which is not read; expected none"
                    raise ApiError(400, message, headers={"Connection": "close"})
                scope["method"] = "GET"  # every route of GET answers HEAD, without the body
                await self._answer(scope, body, receive, send, deadline, head=method == "HEAD")
                return
            if not self._requests.fits(client, 1):
                self._end_stalled(client)
            with self._requests.holding(client, 1):
                try:
                    await self._read(headers, body, receive, deadline, client)
                    await self._answer(scope, body, receive, send, deadline)
                finally:
                    self._bytes.add(client, -_counted(body))
        except ApiError as error:
            if error.status == _BUSY:
                await self.pause(client)
            await error.response(scope)(scope, receive, send)

    async def pause(self, client: Hashable) -> None:
        """Holds a refusal back, longer the more of them a client gets: it may ask again at once."""
        with self._refused.holding(client, 1):
            await asyncio.sleep(min(_PAUSE * self._refused.held_by(client), _LONGEST_PAUSE))

    def _end_stalled(self, client: Hashable) -> None:
        """Ends the reading of the body that has been arriving for longest: this client's, or of one that has more."""
        num_requests = self._requests.held_by(client)
        for limit, owner in self._reading.items():
            has_more = owner == client or self._requests.held_by(owner) > num_requests
            if has_more and not limit.expired():
                del self._reading[limit]
                _expire(limit)
                return
        raise _busy("too many requests at once")

    async def _read(
        self, headers: Headers, body: bytearray, receive: Receive, deadline: float, client: Hashable
    ) -> None:
        limit = asyncio.timeout_at(deadline)
        self._reading[limit] = client
        try:
            async with limit:
                self._check_size(int(headers.get("content-length", "0")))
                chunks, more = 0, True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _invalid("the body ends early, or is not sent in valid chunks")
                    if chunks > _CHUNKS + len(body) // _CHUNK and "transfer-encoding" in headers:
                        raise _invalid("the body is sent in too many short chunks")
                    before = _counted(body)
                    body += message.get("body", b"")
                    self._bytes.add(client, _counted(body) - before)
                    self._check_size(len(body))
                    if _counted(body) and not self._bytes.fits(client, 0):
                        raise _busy("too many large requests at once")
                    chunks, more = chunks + 1, message.get("more_body", False)
        except TimeoutError:
            if limit not in self._reading:
                raise _busy("too many requests at once") from None
            error = ApiError(
                408, f"the request was not sent within {self.timeout:g} s; send less, or faster"
            )
            raise error from None
        finally:
            self._reading.pop(limit, None)

    def _check_size(self, size: int) -> None:
        if size > self._max_body:
            message = f"the body is larger than {self._max_body} bytes; send several requests, or smaller images"
            raise ApiError(413, message)

    async def _answer(
        self,
        scope: Scope,
        body: bytearray,
        receive: Receive,
        send: Send,
        deadline: float,
        *,
        head: bool = False,
    ) -> None:
        """Runs the application until the deadline, or until the client disconnects or stalls."""
        left, limit = False, asyncio.timeout_at(deadline)
        answer = _Answer(self, send, limit, head=head)
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await asyncio.Future()  # until it is cancelled

        async def end_when_left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            _expire(limit)

        try:
            async with limit:
                watching = asyncio.ensure_future(end_when_left())
                try:
                    await self._starts.turn()
                    await self._app(scope, replay, answer)
                finally:
                    left = watching.done()
                    watching.cancel()
        except Exception as error:
            if left or answer.done:
                return
            if isinstance(error, TimeoutError) and limit.expired():
                if answer.started:
                    raise  # the connection is closed, so that the client sees that the response is not whole
                message = f"no answer within {self.timeout:g} s; try again later"
                raise ApiError(503, message, headers={"Retry-After": "10"}) from None
            failure = failed(scope, error)
            if not answer.started:
                raise failure from None


class _Answer:
    """Sends a response in parts, each of which has the whole time, and counts the bytes that were not yet read."""

    def __init__(
        self, limits: RequestLimitsMiddleware, send: Send, limit: asyncio.Timeout, *, head: bool
    ) -> None:
        self._limits, self._send, self._limit, self._head = limits, send, limit, head
        self.started = self.done = False
        self._size = self._sent = 0
        self._since = 0.0

    async def __call__(self, message: Message) -> None:
        if message.get("status") == _BUSY:
            await self._limits.pause(CLIENT.get())
        self.started = True
        body = message.get("body", b"")
        if self._head and message["type"] == "http.response.body":
            await self._send_part({"type": message["type"], "body": b""})
            self.done = True
            raise ConnectionAbortedError  # so that no more of the body is made
        if len(body) <= _OWN:
            await self._send_part(message)
            return
        others, now = self._limits.answers, asyncio.get_running_loop().time()
        self._size, self._since = len(body), now
        while (
            others and self._size + sum(other._size for other in others) > self._limits.most_bytes
        ):
            slowest = min(others, key=lambda other: other._sent / (now - other._since + 1e-3))
            others.discard(slowest)
            _expire(slowest._limit)
        others.add(self)
        try:
            for start in range(0, len(body), _OWN):
                more = start + _OWN < len(body) or message.get("more_body", False)
                await self._send_part(
                    {**message, "body": body[start : start + _OWN], "more_body": more}
                )
                self._sent = start + _OWN
        finally:
            others.discard(self)

    async def _send_part(self, message: Message) -> None:
        await self._send(message)
        now, end = asyncio.get_running_loop().time(), self._limit.when()
        if end is not None and end > now:  # else the client is being disconnected
            self._limit.reschedule(now + self._limits.timeout)


class StrictHttpMiddleware:
    """Refuses heads that others may read in another way than the server, or that are too long.

    Of a body that is answered before it is read, the rest is read and dropped for a while: a connection that is closed
    at once may lose the response.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        more = _has_body(Headers(scope=scope))

        async def reading() -> Message:
            nonlocal more
            message = await receive()
            more = more and message["type"] == "http.request" and bool(message.get("more_body"))
            return message

        async def closing(message: Message) -> None:
            if more and message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        error = _bad_head(scope)
        await (self._app if error is None else error.response(scope))(scope, reading, closing)
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN):
                while more:
                    await reading()


def _bad_head(scope: Scope) -> ApiError | None:
    given: list[tuple[bytes, bytes]] = scope["headers"]
    size = (
        len(scope["raw_path"])
        + len(scope["query_string"])
        + sum(len(b"".join(line)) + 4 for line in given)
    )
    if size > HEAD_BYTES:
        message = f"the headers have {size} bytes; expected {HEAD_BYTES} at most"
        return ApiError(431, message, code="invalid_http", headers={"Connection": "close"})
    hosts = [value for name, value in given if name == b"host"]
    if len(hosts) > 1 or (scope["http_version"] == "1.1" and not any(hosts)):
        return _invalid(f"the request has {len(hosts)} Host headers; expected one with a name")
    encodings = [value.strip().lower() for name, value in given if name == b"transfer-encoding"]
    if encodings not in ([], [b"chunked"]):
        return _invalid(
            "the body is sent with a Transfer-Encoding other than chunked, which is not read"
        )
    return None


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _invalid(reason: str) -> ApiError:
    return ApiError(
        400, f"{reason}; expected HTTP/1.1", code="invalid_http", headers={"Connection": "close"}
    )


def _busy(reason: str) -> ApiError:
    return ApiError(_BUSY, f"{reason}; try again in a second", headers={"Retry-After": "1"})


def _counted(body: bytearray) -> int:
    return max(0, len(body) - _OWN)


def _expire(limit: asyncio.Timeout) -> None:
    if not limit.expired():
        limit.reschedule(asyncio.get_running_loop().time())
