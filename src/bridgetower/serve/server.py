"""The application on Granian: its address, its limits on connections, its shutdown."""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import Any

from granian import net
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server.embed import Server as Embedded

from bridgetower.serve.app import build_app
from bridgetower.serve.config import ServeConfig, is_loopback
from bridgetower.serve.middleware import HEAD_BYTES
from bridgetower.serve.replicas import mark_listening
from bridgetower.serve.service import Service

logger = logging.getLogger(__name__)

_CONNECTIONS = 4096  # read at once; further ones wait in the backlog, which is as long
_FILES = 4 * _CONNECTIONS  # the model and the index need some too
_PATIENCE = 10.0  # seconds for the head of a request, and between two requests of a connection
_SWITCH = 0.0001  # seconds for which a thread of Python keeps others waiting; texts are computed beside images
# Thresholds of the garbage collection, during which no thread of Python runs.
_GARBAGE = (5_000, 20, 20)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Granian configures logging, which closes the handlers that there are, and with some of them standard error.
_NO_LOGGING: dict[str, Any] = {
    "incremental": True,
    "formatters": {},
    "handlers": {},
    "root": {},
    "loggers": {"_granian": {}, "granian.access": {}},
}


def take_port(config: ServeConfig) -> socket.socket:
    """Binds the port without listening, before anything that takes time."""
    if config.api_key is None and not is_loopback(config.host):
        raise ValueError(
            f"host {config.host} can be reached from other machines; set an API key in BRIDGETOWER_API_KEY, "
            "or serve at 127.0.0.1"
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM
        )[0]
        # A port that is taken is refused, also one that is shared. The system chooses no such port itself.
        if config.port:
            socket.create_server(address, family=family).close()
        return shared_port(address, family)
    except OSError as error:
        reason = str(error.strerror).partition(" (while attempting")[0]  # before the address again
        raise OSError(
            f"cannot listen at {config.host}, port {config.port}: {reason}; choose another"
        ) from error


def shared_port(address: tuple[Any, ...], family: int) -> socket.socket:
    """Binds a port that other processes of this user bind too. The system spreads connections over all listeners."""
    bound = socket.socket(family)
    # With SO_REUSEADDR as well, others could take it too.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind(address)
    return bound


def serve(service: Service, listener: socket.socket) -> None:
    """Serves at a bound socket until the process gets SIGTERM, SIGHUP or Ctrl-C, then finishes what it has."""
    server = Server(service, listener, connections=min(_CONNECTIONS, _open_files() // 4))
    sys.setswitchinterval(_SWITCH)
    gc.set_threshold(*_GARBAGE)
    gc.collect()
    gc.freeze()  # what was loaded stays; collecting it again would stop the server for 0.15 s each time
    server.run()


class Server(Embedded):
    """Granian in this process, with a bound socket and a service."""

    def __init__(
        self,
        service: Service,
        listener: socket.socket,
        *,
        connections: int,
        patience: float = _PATIENCE,
    ) -> None:
        timeout = service.config.timeout
        host, port = listener.getsockname()[:2]
        super().__init__(
            build_app(service),
            host,
            port,
            interface=Interfaces.ASGINL,
            http=HTTPModes.http1,
            websockets=False,
            backlog=_CONNECTIONS,
            backpressure=connections,
            log_level=LogLevels.error,  # lower levels report an address that is not this socket's
            log_dictconfig=_NO_LOGGING,
            http1_settings=HTTP1Settings(
                header_read_timeout=round(1000 * min(patience, timeout)), max_buffer_size=HEAD_BYTES
            ),
        )
        # Seconds for requests in progress when it is stopped.
        self.workers_kill_timeout = round(timeout + patience)
        self._service = service
        self._listener = listener
        self._signal: int | None = None
        self.started = threading.Event()

    def run(self) -> None:
        """Serves until it is stopped. A signal that stopped it then takes its usual effect."""
        asyncio.run(self._run())
        logger.info("stopped")
        if self._signal is not None:
            signal.raise_signal(self._signal)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with self._service.running():
            if threading.current_thread() is threading.main_thread():
                for number in _SIGNALS:
                    if signal.getsignal(number) is not signal.SIG_IGN:
                        self._loop.add_signal_handler(number, self._stop_by_signal, number)
            with suppress(TimeoutError):
                await self.serve()

    def _stop_by_signal(self, number: int) -> None:
        self._signal = number
        for handled in _SIGNALS:
            self._loop.remove_signal_handler(handled)  # the next one ends the process at once
        self.stop()

    def stop(self) -> None:
        """Takes no more connections and finishes the requests that it has. Any thread may call it."""
        logger.info("stopping: requests that were admitted are finished first")
        self._loop.call_soon_threadsafe(super().stop)

    def _init_shared_socket(self) -> None:
        """Listens. Granian calls it."""
        listener = self._listener
        host, port = listener.getsockname()[:2]
        # Clients that read nothing of their responses are disconnected.
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = round(1000 * self._service.config.timeout)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self._shd = net.SocketHolder(listener.fileno(), False, _CONNECTIONS)  # type: ignore[assignment, attr-defined, call-arg]
        except (AttributeError, TypeError):
            # Another release of Granian, which binds the address itself.
            listener.close()
            super()._init_shared_socket()  # type: ignore[no-untyped-call]
        else:
            listener.listen(_CONNECTIONS)
            # Else closed connections keep the port from the next server for a minute; set before, others could take it.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setblocking(False)
            listener.detach()
        self.started.set()
        mark_listening()
        address = f"[{host}]" if ":" in host else host
        logger.info("serving %s at http://%s:%d", self._service.main.name, address, port)


def _open_files() -> int:
    """Raises the process's limit of open files as far as useful and allowed, and returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft not in (resource.RLIM_INFINITY, hard) and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit
