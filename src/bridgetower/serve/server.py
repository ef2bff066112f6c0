"""Runs the application: listens, logs where, and finishes what was taken in when it is told to stop."""

from __future__ import annotations

import gc
import logging
import math
import resource
import socket
from functools import partial

import uvicorn

from bridgetower.serve.app import build_app
from bridgetower.serve.config import ServeConfig, is_loopback
from bridgetower.serve.connections import Connection, Waiting
from bridgetower.serve.service import Service

logger = logging.getLogger(__name__)

_CONNECTIONS = 2000
_FILES = 4 * _CONNECTIONS  # the model, the index, and connections that are about to be closed, need some too
_ACCEPTED_TOGETHER = 256  # connections; those that are too many are closed a moment later
_PATIENCE = 10.0  # seconds
_KEEP_ALIVE = 75  # seconds; longer than clients keep a connection, so that none sends into a closed one


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
    # asyncio sets this only on sockets that name their protocol; without it an answer may wait 40 ms for its client.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def serve(service: Service, listener: socket.socket) -> None:
    """Serves until the process gets SIGTERM or Ctrl-C, then finishes what it has taken in.

    Args:
        service: The model.
        listener: From `listen`.
    """
    server = server_of(service, connections=min(_CONNECTIONS, _open_files() // 4))
    gc.collect()
    gc.freeze()  # what was loaded stays: looking through it again and again would stop the server for 0.15 s each time
    server.run(sockets=[listener])


def server_of(service: Service, *, connections: int = _CONNECTIONS, patience: float = _PATIENCE) -> uvicorn.Server:
    """Returns what serves a model once it is run.

    Args:
        service: The model.
        connections: Most at once; of more, those that have waited longest for a request are closed.
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
    """Lets the process have as many open files as are of use to it, and returns how many it may have of these."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft not in (resource.RLIM_INFINITY, hard) and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


class _Server(uvicorn.Server):
    """Says in the log what happens."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            place = f"[{host}]" if ":" in host else host
            logger.info("serving %s at http://%s:%d", self._service.name, place, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logger.info("stopping: %d items are finished first", self._service.batcher.admitted)
        await super().shutdown(sockets)
        logger.info("stopped")
