"""Images at URLs, from hosts that are allowed by name and nowhere else."""

from __future__ import annotations

import asyncio
import io
import ipaddress
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import cached_property, partial
from http.client import HTTPConnection, HTTPException, HTTPResponse
from threading import BoundedSemaphore, Thread
from typing import Any
from urllib.parse import SplitResult, urlsplit

from bridgetower.serve.queues import Turns

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_PORTS = {"http": 80, "https": 443}
_CHUNK = 2**16
AT_ONCE = 8
"""Images that are fetched at the same time; more wait."""

_INTERNET = ipaddress.ip_network("2000::/3")
"""All of IPv6 that is given to networks of the internet; outside are this machine, local networks and mapped IPv4."""

_SPECIAL = [
    ipaddress.ip_network(network)
    for network in (
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),  # Teredo and other protocols, documentation, 6to4
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
        *("192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
        "224.0.0.0/3",  # multicast and what is reserved
    )
]
"""Networks for special purposes, as IANA's registries have them; those in Python differ by its release."""


class RemoteImages:
    """Fetches images by URL.

    The host of a URL must be one of those allowed, and all its addresses public ones: a name that someone points to
    this machine or its network leads nowhere. What was checked is what is connected to. Redirects are not followed,
    proxies not used. One deadline is over the look-up of the name, the connection, headers and content.
    """

    def __init__(
        self,
        hosts: Collection[str],
        *,
        max_bytes: int,
        timeout: float,
        may_connect: Callable[[Address], bool] | None = None,
        look_up: Callable[[str, int], list[str]] | None = None,
    ) -> None:
        self._hosts = {host.lower() for host in hosts}
        self._max_bytes, self._timeout = max_bytes, timeout
        self._may_connect, self._look_up = may_connect or is_public, look_up or _addresses
        self._threads = Turns(AT_ONCE, "remote")
        self._slots, self._look_ups = asyncio.Semaphore(AT_ONCE), BoundedSemaphore(AT_ONCE)

    @asynccontextmanager
    async def fetched(self, url: str) -> AsyncIterator[bytes]:
        """Fetches as `fetch` does, in a thread; `AT_ONCE` files are held until the block of each ends."""
        async with self._slots:
            with self._threads.turn() as turn:
                content = await self._threads.run(turn, lambda: self.fetch(url))
            yield content

    def close(self) -> None:
        """Ends the threads without waiting for fetches that were begun."""
        self._threads.close()

    def fetch(self, url: str) -> bytes:
        """Returns what is at a URL."""
        deadline = _Deadline(self._timeout)
        parts, port = self._checked(url)
        try:
            connection = self._connection(parts, port, deadline)
            try:
                return self._answer(connection, parts)
            finally:
                connection.close()
        except TimeoutError as error:
            raise ValueError(f"the file at the URL did not arrive within {self._timeout:g} s") from error
        except HTTPException as error:
            raise ValueError(f"{parts.hostname} does not answer in HTTP ({type(error).__name__})") from error

    def _answer(self, connection: HTTPConnection, parts: SplitResult) -> bytes:
        connection.request("GET", f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/")
        response = connection.getresponse()
        if response.status != 200:
            redirect = "; redirects are not followed" if 300 <= response.status < 400 else ""
            raise ValueError(f"{parts.hostname} answered with status {response.status}{redirect}")
        content = bytearray()
        while part := response.read1(_CHUNK):
            content += part
            if len(content) > self._max_bytes:
                raise ValueError(f"the file at the URL is larger than {self._max_bytes} bytes")
        return bytes(content)

    def _checked(self, url: str) -> tuple[SplitResult, int]:
        if not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError("a URL has characters that must be escaped in one")
        parts = urlsplit(url)
        usual = _PORTS[parts.scheme.lower()]
        port = parts.port or usual
        host = (parts.hostname or "") if port == usual else f"{parts.hostname}:{port}"
        if host not in self._hosts or "@" in parts.netloc:
            raise ValueError(f"images are not fetched from {host!r}; send a data URI, or have the host allowed")
        return parts, port

    def _connection(self, parts: SplitResult, port: int, deadline: _Deadline) -> HTTPConnection:
        host = parts.hostname or ""
        found = self._found(host, port, deadline)
        if not all(self._may_connect(ipaddress.ip_address(address.partition("%")[0])) for address in found):
            raise ValueError(f"host {host!r} is at an address that is not public")
        tls = self._tls if parts.scheme.lower() == "https" else None
        return _Pinned(host, port, found, deadline, tls)

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        """Checks certificates; kept, because reading those of the system is slow."""
        return ssl.create_default_context()

    def _found(self, host: str, port: int, deadline: _Deadline) -> list[str]:
        """Looks a name up in a thread of its own, which outlives the deadline: it cannot be ended."""
        if not self._look_ups.acquire(timeout=deadline.left()):
            raise TimeoutError
        answer: Future[list[str]] = Future()

        def look_up() -> None:
            try:
                answer.set_result(self._look_up(host, port))
            except (OSError, UnicodeError) as error:
                answer.set_exception(ValueError(f"host {host!r} is not known ({error})"))
            finally:
                self._look_ups.release()

        Thread(target=look_up, name="look-up", daemon=True).start()
        return answer.result(timeout=deadline.left())


def _addresses(host: str, port: int) -> list[str]:
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def is_public(address: Address) -> bool:
    """Whether an address is public and does not embed another address."""
    if address.version == 6 and address not in _INTERNET:
        return False
    return address.is_global and not any(address in network for network in _SPECIAL)


class _Deadline:
    """The deadline of a fetch."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class _Incoming(io.RawIOBase):
    """Reads from a socket until the deadline, however small the pieces."""

    def __init__(self, raw: io.RawIOBase, connection: socket.socket, deadline: _Deadline) -> None:
        self._raw, self._connection, self._deadline = raw, connection, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        self._connection.settimeout(self._deadline.left())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(HTTPResponse):
    """Headers and content until the deadline."""

    def __init__(self, connection: socket.socket, *args: Any, deadline: _Deadline, **options: Any) -> None:
        super().__init__(connection, *args, **options)
        self.fp: Any = io.BufferedReader(_Incoming(self.fp.detach(), connection, deadline))


class _Pinned(HTTPConnection):
    """Connects to addresses that were checked, even if the name resolves to others by now; TLS checks the name."""

    response_class: Any

    def __init__(
        self, host: str, port: int, addresses: Sequence[str], deadline: _Deadline, tls: ssl.SSLContext | None
    ) -> None:
        super().__init__(host, port)
        self.default_port = _PORTS["http" if tls is None else "https"]
        self._pinned, self._deadline, self._tls = addresses, deadline, tls
        self.response_class = partial(_Response, deadline=deadline)

    def connect(self) -> None:
        self.sock = self._reached()
        if self._tls is not None:
            self.sock.settimeout(self._deadline.left())
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host)
        self.sock.settimeout(self._deadline.left())

    def _reached(self) -> socket.socket:
        """Connects to the first address that can be reached; each has its share of the time that is left."""
        for number, address in enumerate(self._pinned, start=1):
            try:
                seconds = self._deadline.left() / (len(self._pinned) - number + 1)
                return socket.create_connection((address, self.port), seconds)
            except OSError:
                if number == len(self._pinned):
                    raise
        raise OSError(f"host {self.host!r} has no address")
