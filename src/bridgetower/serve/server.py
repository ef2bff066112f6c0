"""Runs the application: its address, limits on connections, shutdown."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import re
import resource
import socket
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from bridgetower.serve.app import build_app
from bridgetower.serve.config import ServeConfig, is_loopback
from bridgetower.serve.errors import ApiError
from bridgetower.serve.middleware import ABORT
from bridgetower.serve.service import Service

logger = logging.getLogger(__name__)

_CONNECTIONS = 2000
_FILES = 4 * _CONNECTIONS  # the model, the index, and connections that are about to be closed, need some too
_ACCEPTED_TOGETHER = 256  # connections; those that are too many are closed a moment later
_PATIENCE = 10.0  # seconds
_KEEP_ALIVE = 75  # seconds; longer than clients keep a connection, so that none sends into a closed one
_HEAD, _LINES = 2**16, 128  # bytes and lines of a request without its body
_CHUNKS, _CHUNK = 256, 1024  # chunks that any body may have; bytes of a body for each chunk more
_LAST_CHUNK = re.compile(rb"\r?\n?0+[;\s]")
_BLANK_LINE = re.compile(rb"\n\r?\n")


def listen(config: ServeConfig) -> socket.socket:
    """Takes the port, before anything that takes time.

    Raises:
        ValueError: Other machines could reach the server, and there is no API key.
        OSError: The port is in use, or the host is no address of this machine.
    """
    if config.api_key is None and not is_loopback(config.host):
        raise ValueError(
            f"host {config.host} can be reached from other machines; set an API key, or serve at 127.0.0.1"
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address, family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (while attempting")[0]  # Python names the address again
        raise OSError(f"cannot listen at {config.host}, port {config.port}: {reason}; choose another") from error
    # asyncio sets this only on sockets that name their protocol; without it a response may be delayed by 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def serve(service: Service, listener: socket.socket) -> None:
    """Serves until the process gets SIGTERM or Ctrl-C, then finishes the requests that it has.

    Args:
        service: The model.
        listener: From `listen`.

    Raises:
        SystemExit: The service could not be started; the log has the reason.
    """
    server = server_of(service, connections=min(_CONNECTIONS, _open_files() // 4))
    gc.collect()
    gc.freeze()  # what was loaded stays; collecting it again would stop the server for 0.15 s each time
    server.run(sockets=[listener])
    if not server.started:
        raise SystemExit(3)  # as uvicorn does in later releases


def server_of(service: Service, *, connections: int = _CONNECTIONS, patience: float = _PATIENCE) -> uvicorn.Server:
    """Returns the server of a model, not yet running.

    Args:
        service: The model.
        connections: Most at once; of more, those that have been idle for longest are closed.
        patience: Seconds for the headers of a request.
    """
    timeout = service.config.timeout
    waiting = Waiting(most=connections, seconds=min(patience, timeout), stalled=timeout)
    config = uvicorn.Config(
        build_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        http=partial(Connection, waiting=waiting),  # type: ignore[arg-type]  # it is called, and nothing else
        ws="none",
        backlog=_ACCEPTED_TOGETHER,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=math.ceil(timeout) + 1,
    )
    return _Server(config, service)


def _open_files() -> int:
    """Raises the process's limit of open files as far as useful and allowed, and returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft not in (resource.RLIM_INFINITY, hard) and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


class _Server(uvicorn.Server):
    """Logs its start and its end."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in (sockets or []) if self.started else []:
            host, port = listener.getsockname()[:2]
            place = f"[{host}]" if ":" in host else host
            logger.info("serving %s at http://%s:%d", self._service.name, place, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logger.info("stopping: %d items are finished first", self._service.batcher.admitted)
        await super().shutdown(sockets)
        logger.info("stopped")


@dataclass
class Waiting:
    """Limits and idle connections of a server.

    Attributes:
        most: Connections; of more, an idle one is closed, or one whose client does not read.
        seconds: For the headers of a request, and for reading on after an early response.
        stalled: Seconds after which a client that reads nothing of its response is disconnected.
        idle: Connections without a request, the one that has been idle for longest first.
        unread: Connections whose clients do not read, the one that has stalled for longest first.
    """

    most: int
    seconds: float
    stalled: float
    idle: dict[Connection, None] = field(default_factory=dict)
    unread: dict[Connection, None] = field(default_factory=dict)


class _Parser(h11.Connection):
    """Parses HTTP, with limits on what takes long for its length: lines of a head or trailer, and chunks.

    Meanwhile the server does nothing else.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, _HEAD)
        self._chunks = self._bytes = 0
        self._chunk_next = self._trailer_next = False

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        received = self.trailing_data[0] if self.their_state is h11.IDLE or self._chunk_next else b""
        self._trailer_next = self._trailer_next or (self._chunk_next and _LAST_CHUNK.match(received) is not None)
        if self._trailer_next or self.their_state is h11.IDLE:
            end = _BLANK_LINE.search(received)
            if received.count(b"\n", 0, end.end() if end else len(received)) > _LINES:
                raise h11.RemoteProtocolError("too many lines")
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
            self._chunk_next = any(name == b"transfer-encoding" for name, _ in event.headers)
        elif isinstance(event, h11.Data):
            self._count(event)
        elif isinstance(event, h11.EndOfMessage):
            self._chunk_next = self._trailer_next = False
        return event

    def _count(self, part: h11.Data) -> None:
        self._chunks += part.chunk_start
        self._bytes += len(part.data)
        self._chunk_next = part.chunk_end
        if self._chunks > _CHUNKS + self._bytes // _CHUNK:
            raise h11.RemoteProtocolError("too many short chunks")


class Connection(H11Protocol):
    """A connection with limits on the time for a request to arrive, and for its response to be read."""

    def __init__(self, *, waiting: Waiting, **settings: Any) -> None:
        super().__init__(**settings)
        self.conn = _Parser()
        self._waiting = waiting
        self._late: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._refused = False
        self.app = self._abortable(self.app)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Counts the connection as idle; closes one that is idle or stalls if there are too many."""
        super().connection_made(transport)
        self._look()
        if len(self.connections) > self._waiting.most:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """Takes a part of a request; what follows an error is discarded."""
        if not self._refused:
            super().data_received(data)
            self._look()

    def on_response_complete(self) -> None:
        """Goes on to the next request."""
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancels all timers."""
        super().connection_lost(exc)
        self._waiting.idle.pop(self, None)
        self._waiting.unread.pop(self, None)
        for timer in (self._late, self._stalled):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        """Starts the timer for a client that does not read."""
        super().pause_writing()
        self._waiting.unread[self] = None
        self._stalled = self.loop.call_later(self._waiting.stalled, self.transport.abort)

    def resume_writing(self) -> None:
        """Stops that timer."""
        super().resume_writing()
        self._waiting.unread.pop(self, None)
        if self._stalled is not None:
            self._stalled.cancel()

    def timeout_keep_alive_handler(self) -> None:
        """Closes a connection that was not used again."""
        self._close()

    def send_400_response(self, msg: str) -> None:
        """Responds to what is not valid HTTP."""
        message = "the request is not valid HTTP, or has too many headers or chunks; expected HTTP/1.1"
        self._refuse(ApiError(400, message, code="invalid_http"))

    def _make_room(self) -> None:
        """Closes a connection: a silent one, or else an idle one, or else one that stalls, or else this new one."""
        idle, unread = self._waiting.idle, self._waiting.unread
        silent = next(one for one in idle if one.cycle is None)
        longest = next(iter(idle)) if silent is self else silent
        if longest is self and unread:
            stalled = next(iter(unread))
            del unread[stalled]
            stalled.transport.abort()
            return
        longest._end(ApiError(503, "too many connections; try again in a second", headers={"Retry-After": "1"}))
        longest._close()

    def _abortable(self, app: Any) -> ASGIApp:
        """Gives an application a way to close the connection at once."""

        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            scope.setdefault("extensions", {})[ABORT] = {"end": self.transport.abort}
            await app(scope, receive, send)

        return call

    @property
    def _begun(self) -> bool:
        """Whether a part of the next request is here."""
        return self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])

    def _look(self) -> None:
        """Notes whether it is idle, and starts or stops the timer for the headers of a request."""
        if self.cycle is not None and not self.cycle.response_complete and not self._refused:
            self._waiting.idle.pop(self, None)
            in_time = True
        else:
            self._waiting.idle.setdefault(self)
            in_time = self.timeout_keep_alive_task is not None and not self._begun
        if in_time and self._late is not None:
            self._late.cancel()
            self._late = None
        elif not in_time and self._late is None:
            message = f"the headers were not sent within {self._waiting.seconds:g} s; send them faster"
            self._late = self.loop.call_later(self._waiting.seconds, self._end, ApiError(408, message))

    def _end(self, error: ApiError) -> None:
        """Closes it, with an error if a request had begun."""
        if self._begun and not self._refused:
            self._refuse(error)
        else:
            self._close()

    def _refuse(self, error: ApiError) -> None:
        """Responds with an error, then reads on for a while: closing at once could lose the response."""
        self._refused = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self._close()
            return
        response = error.response()
        headers = [*response.raw_headers, (b"connection", b"close")]
        head = h11.Response(status_code=error.status, headers=headers, reason=STATUS_PHRASES[error.status])
        for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.write_eof()
        self._unset_keepalive_if_required()
        self.loop.call_later(self._waiting.seconds, self._close)

    def _close(self) -> None:
        """Closes it, even if the client does not read what is still to be sent."""
        self._waiting.idle.pop(self, None)
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(self._waiting.seconds, self.transport.abort)
