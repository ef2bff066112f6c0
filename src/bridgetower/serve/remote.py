"""Images at URLs, from hosts that are allowed by name and nowhere else."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import httpcore

from bridgetower.serve.queues import Turns

AT_ONCE = 8  # images that are fetched at the same time; more wait

_PORTS = {"http": 80, "https": 443}
# all of IPv6 that is not of this machine, local networks or mapped IPv4
_INTERNET = ipaddress.ip_network("2000::/3")
_SPECIAL = [  # networks for special purposes, as IANA's registries have them; those in Python differ by its release
    ipaddress.ip_network(network)
    for network in (
        *(
            "2001::/23",
            "2001:db8::/32",
            "2002::/16",
            "3fff::/20",
        ),  # Teredo and other protocols, documentation, 6to4
        *(
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.0.0.0/24",
        ),
        *(
            "192.0.2.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
        ),
        "224.0.0.0/3",  # multicast and what is reserved
    )
]


class RemoteImages(httpcore.AnyIOBackend):
    """Fetches images by URL from hosts that are allowed, if all addresses of a host are public.

    What was checked is what is connected to, so that no name leads to this machine or its network; TLS checks the
    name. Redirects are not followed, proxies not used. One deadline is over look-up, connection, headers and content.
    """

    def __init__(self, hosts: Collection[str], *, max_bytes: int, timeout: float) -> None:
        self._hosts = {host.lower() for host in hosts}
        self._max_bytes, self._timeout = max_bytes, timeout
        self._look_ups, self._slots = Turns(AT_ONCE, "look-up"), asyncio.Semaphore(AT_ONCE)

    @asynccontextmanager
    async def fetched(self, url: str) -> AsyncIterator[bytes]:
        """Lends what is at a URL; `AT_ONCE` files are held until the block of each ends."""
        async with self._slots:
            yield await self.fetch(url)

    async def fetch(self, url: str) -> bytes:
        if not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError("a URL has characters that must be escaped in one")
        parts = urlsplit(url)
        port = parts.port or _PORTS[parts.scheme]
        host = parts.hostname or ""
        shown = host if port == _PORTS[parts.scheme] else f"{host}:{port}"
        if shown not in self._hosts or "@" in parts.netloc:
            raise ValueError(
                f"images are not fetched from {shown!r}; send a data URI, or have the host allowed"
            )
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        place = httpcore.URL(scheme=parts.scheme, host=host, port=port, target=target)
        tls = self._tls if parts.scheme == "https" else None
        content = bytearray()
        try:
            async with (
                asyncio.timeout(self._timeout),
                httpcore.AsyncConnectionPool(ssl_context=tls, network_backend=self) as pool,
                pool.stream("GET", place, headers={"Accept-Encoding": "identity"}) as response,
            ):
                if response.status != 200:
                    redirect = (
                        "; redirects are not followed" if 300 <= response.status < 400 else ""
                    )
                    raise ValueError(f"{host} answered with status {response.status}{redirect}")
                async for part in response.aiter_stream():
                    content += part
                    if len(content) > self._max_bytes:
                        raise ValueError(
                            f"the file at the URL is larger than {self._max_bytes} bytes"
                        )
        except (TimeoutError, httpcore.TimeoutException) as error:
            raise ValueError(
                f"the file at the URL did not arrive within {self._timeout:g} s"
            ) from error
        except httpcore.ProtocolError as error:
            raise ValueError(f"{host} does not answer in HTTP ({error})") from error
        except httpcore.NetworkError as error:
            raise ValueError(f"{host} cannot be read: {error}") from error
        return bytes(content)

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connects to the first address that can be reached; each has its share of the time that is left."""
        deadline = asyncio.get_running_loop().time() + self._timeout
        try:
            # whose thread may outlive the deadline: a look-up cannot be ended
            with self._look_ups.turn() as turn:
                entries = await self._look_ups.run(
                    turn, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                )
        except (OSError, UnicodeError) as error:
            raise ValueError(f"host {host!r} is not known ({error})") from error
        found = [str(entry[4][0]) for entry in entries]
        if not all(is_public(ipaddress.ip_address(address.partition("%")[0])) for address in found):
            raise ValueError(f"host {host!r} is at an address that is not public")
        for number, address in enumerate(found):
            share = (deadline - asyncio.get_running_loop().time()) / (len(found) - number)
            try:
                return await super().connect_tcp(address, port, share)
            except (httpcore.NetworkError, httpcore.TimeoutException):
                if number == len(found) - 1:
                    raise
        raise ValueError(f"host {host!r} has no address")

    def close(self) -> None:
        self._look_ups.close()

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        """Checks certificates; kept, because reading those of the system is slow."""
        return ssl.create_default_context()


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is public and does not embed another address."""
    if address.version == 6 and address not in _INTERNET:
        return False
    return address.is_global and not any(address in network for network in _SPECIAL)
