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
# All of IPv6 but addresses of this machine, of local networks, and of mapped IPv4.
_INTERNET = ipaddress.ip_network("2000::/3")
# Networks for special purposes, as IANA's registries have them. The list in Python differs by its release.
_SPECIAL_NETWORKS = """
2001::/23 2001:db8::/32 2002::/16 3fff::/20
0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24
192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/3
"""
_SPECIAL = [ipaddress.ip_network(network) for network in _SPECIAL_NETWORKS.split()]


class RemoteImages(httpcore.AnyIOBackend):
    """Fetches images by URL from hosts that are allowed, if all addresses of a host are public.

    The addresses that were checked are connected to, so that no name leads to this machine or its network; TLS checks
    the name. Redirects are not followed, proxies not used. One deadline is over look-up, connection, headers and
    content.
    """

    def __init__(self, hosts: Collection[str], *, max_bytes: int, timeout: float) -> None:
        self._hosts = {host.lower() for host in hosts}
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._look_ups = Turns(AT_ONCE, "look-up")
        self._slots = asyncio.Semaphore(AT_ONCE)

    @asynccontextmanager
    async def fetched(self, url: str) -> AsyncIterator[bytes]:
        """Lends the content of a URL. At most `AT_ONCE` files are held, each until its block ends."""
        async with self._slots:
            yield await self.fetch(url)

    async def fetch(self, url: str) -> bytes:
        address = self._address(url)
        host = address.host.decode()
        try:
            async with asyncio.timeout(self._timeout):
                return await self._read(address, host)
        except (TimeoutError, httpcore.TimeoutException) as error:
            raise ValueError(
                f"the file at the URL did not arrive within {self._timeout:g} s"
            ) from error
        except httpcore.ProtocolError as error:
            raise ValueError(f"{host} does not answer in HTTP ({error})") from error
        except httpcore.NetworkError as error:
            raise ValueError(f"{host} cannot be read: {error}") from error

    def _address(self, url: str) -> httpcore.URL:
        """Parses a URL, whose host must be allowed."""
        if not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError("a URL has characters that must be escaped in one")
        fields = urlsplit(url)
        usual_port = _PORTS[fields.scheme]
        port = fields.port or usual_port
        host = fields.hostname or ""
        name = host if port == usual_port else f"{host}:{port}"
        if name not in self._hosts or "@" in fields.netloc:
            raise ValueError(
                f"images are not fetched from {name!r}; send a data URI, or have the host allowed"
            )
        target = fields.path or "/"
        if fields.query:
            target += f"?{fields.query}"
        return httpcore.URL(scheme=fields.scheme, host=host, port=port, target=target)

    async def _read(self, address: httpcore.URL, host: str) -> bytes:
        tls = self._tls if address.scheme == b"https" else None
        content = bytearray()
        async with (
            httpcore.AsyncConnectionPool(ssl_context=tls, network_backend=self) as pool,
            pool.stream("GET", address, headers={"Accept-Encoding": "identity"}) as response,
        ):
            if response.status != 200:
                is_redirect = 300 <= response.status < 400
                hint = "; redirects are not followed" if is_redirect else ""
                raise ValueError(f"{host} answered with status {response.status}{hint}")
            async for chunk in response.aiter_stream():
                content += chunk
                if len(content) > self._max_bytes:
                    raise ValueError(f"the file at the URL is larger than {self._max_bytes} bytes")
        return bytes(content)

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connects to the first address that can be reached. Each has its share of the remaining time."""
        deadline = asyncio.get_running_loop().time() + self._timeout
        try:
            # The thread may outlive the deadline: a look-up cannot be ended.
            with self._look_ups.turn() as turn:
                entries = await self._look_ups.run(
                    turn, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                )
        except (OSError, UnicodeError) as error:
            raise ValueError(f"host {host!r} is not known ({error})") from error
        addresses = [str(entry[4][0]) for entry in entries]
        for address in addresses:
            if not is_public(ipaddress.ip_address(address.partition("%")[0])):
                raise ValueError(f"host {host!r} is at an address that is not public")
        for num_left in range(len(addresses), 0, -1):
            seconds = (deadline - asyncio.get_running_loop().time()) / num_left
            try:
                return await super().connect_tcp(addresses[-num_left], port, seconds)
            except (httpcore.NetworkError, httpcore.TimeoutException):
                if num_left == 1:
                    raise
        raise ValueError(f"host {host!r} has no address")

    def close(self) -> None:
        self._look_ups.close()

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        """Checks certificates. It is kept, because reading the system's certificates is slow."""
        return ssl.create_default_context()


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Tells whether an address is public and does not embed another address."""
    if address.version == 6 and address not in _INTERNET:
        return False
    return address.is_global and not any(address in network for network in _SPECIAL)
