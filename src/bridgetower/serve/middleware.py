"""Limits on what every request may take."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bridgetower.serve.errors import ApiError, failed

HEAD_BYTES = 2**16
"""Most bytes of the head of a request."""

_DRAIN = 5.0  # seconds for which the rest of a body is read after its response
_CHUNKS, _CHUNK = 256, 1024  # chunks that any body may have; bytes of a body for each chunk more

_WITHOUT_BODY = ("GET", "HEAD")
_REQUESTS = 1000  # with bodies, that are read or answered at once
_BODIES = 8  # of the largest size that are held at once, and as many bytes of answers
_OWN = 2**16  # bytes of a body, or of an answer, for which there is always room


class RequestLimitsMiddleware:
    """Limits the body of a request, the time for its response, and the responses that clients have not yet read.

    GET and HEAD have no body, and are let through however many other requests there are.

    Stalled clients are disconnected when others need the room. Of too many requests, the one whose body has been
    arriving for longest is dropped; of too many bytes of responses, the one that is read most slowly. The first 64 KiB
    of a body are not counted, so small bodies are read however many large ones there are.

    A request whose client disconnects is dropped, and its queued items are not computed.
    """

    def __init__(self, app: ASGIApp, *, max_body: int, timeout: float, requests: int = _REQUESTS) -> None:
        self._app, self._max_body, self.timeout, self._most = app, max_body, timeout, requests
        self.most_bytes = _BODIES * max_body
        self._held = self._requests = 0
        self._reading: dict[asyncio.Timeout, None] = {}  # that of the body which has been on its way for longest first
        self.answers: set[_Answer] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method, headers, body = scope["method"], Headers(scope=scope), bytearray()
        deadline = asyncio.get_running_loop().time() + self.timeout
        error: ApiError | None
        if method in _WITHOUT_BODY:
            if "transfer-encoding" in headers or headers.get("content-length", "0") != "0":
                message = f"{method} has a body, which is not read; expected none"
                error = ApiError(400, message, headers={"Connection": "close"})
            else:
                scope["method"] = "GET"  # every route of GET answers HEAD, without the body
                error = await self._answered(scope, body, receive, send, deadline, head=method == "HEAD")
        elif self._requests >= self._most and not self._drop_stalled():
            error = _busy("too many requests at once")
        else:
            self._requests += 1
            try:
                error = await self._read(headers, body, receive, deadline)
                error = error or await self._answered(scope, body, receive, send, deadline)
            finally:
                self._requests -= 1
                self._held -= _counted(body)
        if error is not None:
            await error.response(scope)(scope, receive, send)

    async def _read(self, headers: Headers, body: bytearray, receive: Receive, deadline: float) -> ApiError | None:
        """Reads the body; returns what is wrong with it."""
        limit = asyncio.timeout_at(deadline)
        self._reading[limit] = None
        try:
            async with limit:
                self._check(int(headers.get("content-length", "0")))
                chunks, more = 0, True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _invalid("the body ends early, or is not sent in valid chunks")
                    if chunks > _CHUNKS + len(body) // _CHUNK and "transfer-encoding" in headers:
                        raise _invalid("the body is sent in too many short chunks")
                    before = _counted(body)
                    body += message.get("body", b"")
                    self._held += _counted(body) - before
                    self._check(len(body))
                    chunks, more = chunks + 1, message.get("more_body", False)
            return None
        except TimeoutError:
            if limit not in self._reading:
                return _busy("too many requests at once")
            return ApiError(408, f"the request was not sent within {self.timeout:g} s; send less, or faster")
        except ApiError as error:
            return error
        finally:
            self._reading.pop(limit, None)

    async def _answered(
        self, scope: Scope, body: bytearray, receive: Receive, send: Send, deadline: float, *, head: bool = False
    ) -> ApiError | None:
        """Runs the application, and returns an error if nothing was sent yet.

        It is cancelled at the deadline, and when the client disconnects or stalls. Once the response has begun, each
        part of it has the whole time.
        """
        left, limit = False, asyncio.timeout_at(deadline)
        answer = _Answer(self, send, limit, head=head)
        try:
            async with limit:
                watching = asyncio.ensure_future(_end_when_left(receive, limit))
                try:
                    await self._app(scope, _replay(body), answer)
                finally:
                    left = watching.done()
                    watching.cancel()
        except Exception as error:
            if left or answer.done:
                return None
            if isinstance(error, TimeoutError) and limit.expired():
                if answer.started:
                    raise  # the connection is closed, so that the client sees that the response is not whole
                message = f"no answer within {self.timeout:g} s; try again later"
                return ApiError(503, message, headers={"Retry-After": "10"})
            failure = failed(scope, error)
            return None if answer.started else failure
        return None

    def _check(self, size: int) -> None:
        if size > self._max_body:
            message = f"the body is larger than {self._max_body} bytes; send several requests, or smaller images"
            raise ApiError(413, message)
        if self._held > self.most_bytes:
            raise _busy("too many large requests at once")

    def _drop_stalled(self) -> bool:
        """Drops the request whose body has been on its way for longest; False if no body is."""
        limit = next((one for one in self._reading if not one.expired()), None)
        if limit is None:
            return False
        del self._reading[limit]
        _expire(limit)
        return True


class _Answer:
    """Sends a response in parts, and counts the bytes that the client has not yet read."""

    def __init__(self, limits: RequestLimitsMiddleware, send: Send, limit: asyncio.Timeout, *, head: bool) -> None:
        self._limits, self._send, self._limit, self._head = limits, send, limit, head
        self.started = self.done = False
        self._size = self._sent = 0
        self._since = 0.0

    async def __call__(self, message: Message) -> None:
        self.started = True
        body = message.get("body", b"")
        if self._head and message["type"] == "http.response.body":
            await self._send_part({"type": message["type"], "body": b""})
            self.done = True
            raise ConnectionAbortedError  # so that no more of the body is made
        if len(body) <= _OWN:
            await self._send_part(message)
            return
        self._size, self._since = len(body), asyncio.get_running_loop().time()
        self._make_room()
        self._limits.answers.add(self)
        try:
            for start in range(0, len(body), _OWN):
                more = start + _OWN < len(body) or message.get("more_body", False)
                await self._send_part({**message, "body": body[start : start + _OWN], "more_body": more})
                self._sent = start + _OWN
        finally:
            self._limits.answers.discard(self)

    async def _send_part(self, message: Message) -> None:
        await self._send(message)
        now, end = asyncio.get_running_loop().time(), self._limit.when()
        if end is not None and end > now:  # else the client is being disconnected
            self._limit.reschedule(now + self._limits.timeout)

    def _make_room(self) -> None:
        """Disconnects the clients that read most slowly until all responses together are within the limit."""
        now, others = asyncio.get_running_loop().time(), self._limits.answers
        while others and self._size + sum(other._size for other in others) > self._limits.most_bytes:
            slowest = min(others, key=lambda other: other._sent / (now - other._since + 1e-3))
            others.discard(slowest)
            _expire(slowest._limit)


class StrictHttpMiddleware:
    """Refuses heads that others may read in another way than the server, or that are too long.

    Of a body that is answered before it is read, the rest is read and dropped for a while: a connection that is closed
    at once may lose the response.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        more = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"

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
    size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(b"".join(line)) + 4 for line in given)
    if size > HEAD_BYTES:
        message = f"the headers have {size} bytes; expected {HEAD_BYTES} at most"
        return ApiError(431, message, code="invalid_http", headers={"Connection": "close"})
    hosts = [value for name, value in given if name == b"host"]
    if len(hosts) > 1 or (scope["http_version"] == "1.1" and not any(hosts)):
        return _invalid(f"the request has {len(hosts)} Host headers; expected one with a name")
    encodings = [value.strip().lower() for name, value in given if name == b"transfer-encoding"]
    if encodings not in ([], [b"chunked"]):
        return _invalid("the body is sent with a Transfer-Encoding other than chunked, which is not read")
    return None


def _invalid(reason: str) -> ApiError:
    return ApiError(400, f"{reason}; expected HTTP/1.1", code="invalid_http", headers={"Connection": "close"})


def _busy(reason: str) -> ApiError:
    return ApiError(429, f"{reason}; try again in a second", headers={"Retry-After": "1"})


def _counted(body: bytearray) -> int:
    return max(0, len(body) - _OWN)


def _expire(limit: asyncio.Timeout) -> None:
    if not limit.expired():
        limit.reschedule(asyncio.get_running_loop().time())


def _replay(body: bytearray) -> Receive:
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
    _expire(limit)
