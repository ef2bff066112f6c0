"""Limits on every request: its head, its body, its time, and the bytes of its response that wait."""

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
_CHUNKS = 256  # that any body may have
_CHUNK_BYTES = 1024  # of a body for each further chunk
_REQUESTS = 1000  # with bodies, that are read or answered at once
_BODIES = 8  # of the largest size that are held at once, and as many bytes of responses
_FREE_BYTES = 2**16  # of a body, or of a response, for which there is always room
_BUSY = 429  # status of a request that is refused because clients have sent too much
_PAUSE = 0.05  # seconds, for each refusal of a client that waits
_LONGEST_PAUSE = 10.0  # seconds


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
        self._app = app
        self._max_body = max_body
        self.timeout = timeout
        self.max_bytes = _BODIES * max_body
        self._requests = Shares(requests)
        self._bytes = Shares(self.max_bytes)
        # Clients whose bodies arrive, the longest on its way first.
        self._reading: dict[asyncio.Timeout, Hashable] = {}
        self._starts = Starts()
        self._refused = Shares(math.inf)
        self.responses: set[_LimitedSend] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        deadline = asyncio.get_running_loop().time() + self.timeout
        client = client_of(scope)
        CLIENT.set(client)
        try:
            if scope["method"] in ("GET", "HEAD"):
                await self._respond_without_body(scope, receive, send, deadline)
                return
            if not self._requests.fits(client, 1):
                self._end_stalled(client)
            body = bytearray()
            with self._requests.holding(client, 1):
                try:
                    await self._read(Headers(scope=scope), body, receive, deadline, client)
                    await self._respond(scope, body, receive, send, deadline)
                finally:
                    self._bytes.add(client, -_counted(body))
        except ApiError as error:
            if error.status == _BUSY:
                await self.pause(client)
            await error.response(scope)(scope, receive, send)

    async def pause(self, client: Hashable) -> None:
        """Holds a refusal back, longer the more of them a client gets: it may ask again at once."""
        with self._refused.holding(client, 1):
            longest = min(_LONGEST_PAUSE, self.timeout / 2)
            await asyncio.sleep(min(_PAUSE * self._refused.held_by(client), longest))

    def _end_stalled(self, client: Hashable) -> None:
        """Ends the reading of the oldest body of this client, or of a client with more requests."""
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
        """Reads a body within its limits."""
        limit = asyncio.timeout_at(deadline)
        self._reading[limit] = client
        try:
            async with limit:
                self._check_size(int(headers.get("content-length", "0")))
                num_chunks = 0
                is_complete = False
                while not is_complete:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _invalid("the body ends early, or is not sent in valid chunks")
                    max_chunks = _CHUNKS + len(body) // _CHUNK_BYTES
                    if num_chunks > max_chunks and "transfer-encoding" in headers:
                        raise _invalid("the body is sent in too many short chunks")
                    counted_before = _counted(body)
                    body += message.get("body", b"")
                    self._bytes.add(client, _counted(body) - counted_before)
                    self._check_size(len(body))
                    if _counted(body) and not self._bytes.fits(client, 0):
                        raise _busy("too many large requests at once")
                    num_chunks += 1
                    is_complete = not message.get("more_body", False)
        except TimeoutError:
            if limit not in self._reading:  # it was ended for the sake of others
                raise _busy("too many requests at once") from None
            raise ApiError(
                408, f"the request was not sent within {self.timeout:g} s; send less, or faster"
            ) from None
        finally:
            self._reading.pop(limit, None)

    def _check_size(self, size: int) -> None:
        if size > self._max_body:
            message = f"the body is larger than {self._max_body} bytes; send several requests, or smaller images"
            raise ApiError(413, message)

    async def _respond_without_body(
        self, scope: Scope, receive: Receive, send: Send, deadline: float
    ) -> None:
        """Responds to GET and HEAD. Every route of GET answers HEAD, without the body of its response."""
        method = scope["method"]
        if _has_body(Headers(scope=scope)):
            message = f"{method} has a body, which is not read; expected none"
            raise ApiError(400, message, headers={"Connection": "close"})
        scope["method"] = "GET"
        is_head = method == "HEAD"
        await self._respond(scope, bytearray(), receive, send, deadline, is_head=is_head)

    async def _respond(
        self,
        scope: Scope,
        body: bytearray,
        receive: Receive,
        send: Send,
        deadline: float,
        *,
        is_head: bool = False,
    ) -> None:
        """Runs the application until the deadline, or until the client disconnects or stalls."""
        limit = asyncio.timeout_at(deadline)
        limited_send = _LimitedSend(self, send, limit, is_head=is_head)
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        is_disconnected = False

        async def replay() -> Message:
            return messages.pop() if messages else await asyncio.Future()  # until it is cancelled

        async def expire_on_disconnect() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            _expire(limit)

        try:
            async with limit:
                watching = asyncio.ensure_future(expire_on_disconnect())
                try:
                    await self._starts.turn()
                    await self._app(scope, replay, limited_send)
                finally:
                    is_disconnected = watching.done()
                    watching.cancel()
        except Exception as error:
            if is_disconnected or limited_send.is_complete:
                return
            if isinstance(error, TimeoutError) and limit.expired():
                if limited_send.has_started:
                    raise  # the connection is closed, so that the client sees that the response is not whole
                message = f"no answer within {self.timeout:g} s; try again later"
                raise ApiError(503, message, headers={"Retry-After": "10"}) from None
            failure = failed(scope, error)
            if not limited_send.has_started:
                raise failure from None


class _LimitedSend:
    """Sends a response in pieces, each of which has the whole time, and counts the bytes that were not yet read."""

    def __init__(
        self, limits: RequestLimitsMiddleware, send: Send, limit: asyncio.Timeout, *, is_head: bool
    ) -> None:
        self._limits = limits
        self._send = send
        self._limit = limit
        self._is_head = is_head
        self.has_started = False
        self.is_complete = False
        self.size = 0
        self._num_sent = 0
        self._since = 0.0

    async def __call__(self, message: Message) -> None:
        if message.get("status") == _BUSY:
            await self._limits.pause(CLIENT.get())
        self.has_started = True
        body = message.get("body", b"")
        if self._is_head and message["type"] == "http.response.body":
            await self._send_piece({"type": message["type"], "body": b""})
            self.is_complete = True
            raise ConnectionAbortedError  # so that no more of the body is made
        if len(body) <= _FREE_BYTES:
            await self._send_piece(message)
            return

        # Of too many bytes, the response that is read most slowly ends.
        responses = self._limits.responses
        self.size = len(body)
        self._since = asyncio.get_running_loop().time()
        while responses and self._held_bytes() > self._limits.max_bytes:
            slowest = min(responses, key=lambda response: response.speed(self._since))
            responses.discard(slowest)
            _expire(slowest._limit)
        responses.add(self)
        try:
            for start in range(0, len(body), _FREE_BYTES):
                end = start + _FREE_BYTES
                more_body = end < len(body) or message.get("more_body", False)
                await self._send_piece({**message, "body": body[start:end], "more_body": more_body})
                self._num_sent = end
        finally:
            responses.discard(self)

    def _held_bytes(self) -> int:
        return self.size + sum(response.size for response in self._limits.responses)

    def speed(self, now: float) -> float:
        """Returns the bytes per second that the client has read."""
        return self._num_sent / (now - self._since + 1e-3)

    async def _send_piece(self, message: Message) -> None:
        await self._send(message)
        now = asyncio.get_running_loop().time()
        end = self._limit.when()
        if end is not None and end > now:  # else the client is being disconnected
            self._limit.reschedule(now + self._limits.timeout)


class StrictHttpMiddleware:
    """Refuses heads that a proxy may read in another way than the server, or that are too long.

    Of a body that is answered before it is read, the rest is read and dropped for a while: a connection that is closed
    at once may lose the response.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_unread = _has_body(Headers(scope=scope))

        async def receive_body() -> Message:
            nonlocal is_unread
            message = await receive()
            has_more = message["type"] == "http.request" and bool(message.get("more_body"))
            is_unread = is_unread and has_more
            return message

        async def send_and_close(message: Message) -> None:
            if is_unread and message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        error = _head_error(scope)
        app = self._app if error is None else error.response(scope)
        await app(scope, receive_body, send_and_close)
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN):
                while is_unread:
                    await receive_body()


def _head_error(scope: Scope) -> ApiError | None:
    """Returns the error of a head that is too long, or that a proxy may read in another way."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    size = len(scope["raw_path"]) + len(scope["query_string"])
    size += sum(len(name) + len(value) + 4 for name, value in headers)
    if size > HEAD_BYTES:
        message = f"the headers have {size} bytes; expected {HEAD_BYTES} at most"
        return ApiError(431, message, code="invalid_http", headers={"Connection": "close"})
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (scope["http_version"] == "1.1" and not any(hosts)):
        return _invalid(f"the request has {len(hosts)} Host headers; expected one with a name")
    encodings = [value.strip().lower() for name, value in headers if name == b"transfer-encoding"]
    if encodings not in ([], [b"chunked"]):
        return _invalid(
            "the body is sent with a Transfer-Encoding other than chunked, which is not read"
        )
    return None


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _invalid(reason: str) -> ApiError:
    message = f"{reason}; expected HTTP/1.1"
    return ApiError(400, message, code="invalid_http", headers={"Connection": "close"})


def _busy(reason: str) -> ApiError:
    return ApiError(_BUSY, f"{reason}; try again in a second", headers={"Retry-After": "1"})


def _counted(body: bytearray) -> int:
    """Returns the bytes of a body that take room of the limit for all bodies."""
    return max(0, len(body) - _FREE_BYTES)


def _expire(limit: asyncio.Timeout) -> None:
    if not limit.expired():
        limit.reschedule(asyncio.get_running_loop().time())
