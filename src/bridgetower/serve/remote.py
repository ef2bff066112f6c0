"""Pictures at URLs, from hosts that are allowed by name and nowhere else."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Collection
from functools import cached_property
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from urllib.parse import SplitResult, urlsplit

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_PORTS = {"http": 80, "https": 443}
_CHUNK = 2**16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class RemotePictures:
    """Fetches pictures by URL.

    The host of a URL must be one of those allowed, and all its addresses public ones: a name that someone points to
    this machine or its network leads nowhere. What was checked is what is connected to. Redirects are not followed,
    proxies not used.
    """

    def __init__(
        self,
        hosts: Collection[str],
        *,
        max_bytes: int,
        timeout: float,
        may_connect: Callable[[Address], bool] | None = None,
    ) -> None:
        """Connects to nothing yet.

        Args:
            hosts: Names, with `:port` unless it is the usual one.
            max_bytes: Of a picture's file.
            timeout: Seconds for one.
            may_connect: Whether an address may be connected to; None: whether it is public.
        """
        self._hosts = {host.lower() for host in hosts}
        self._max_bytes, self._timeout = max_bytes, timeout
        self._may_connect = may_connect or is_public

    def fetch(self, url: str) -> bytes:
        """Returns what is at a URL.

        Raises:
            ValueError: Its host is not allowed, or what it answers is no file.
            OSError: It cannot be reached.
        """
        deadline = time.monotonic() + self._timeout
        parts, port = self._checked(url)
        connection = self._connection(parts, port)
        try:
            connection.request("GET", f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/")
            response = connection.getresponse()
            if response.status != 200:
                redirect = "; redirects are not followed" if 300 <= response.status < 400 else ""
                raise ValueError(f"{parts.hostname} answered with status {response.status}{redirect}")
            return self._read(response, deadline)
        except HTTPException as error:
            raise ValueError(f"{parts.hostname} does not answer in HTTP ({type(error).__name__})") from error
        finally:
            connection.close()

    def _checked(self, url: str) -> tuple[SplitResult, int]:
        if not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError("a URL has characters that must be escaped in one")
        parts = urlsplit(url)
        usual = _PORTS[parts.scheme.lower()]
        port = parts.port or usual
        host = (parts.hostname or "") if port == usual else f"{parts.hostname}:{port}"
        if host not in self._hosts or "@" in parts.netloc:
            raise ValueError(f"pictures are not fetched from {host!r}; send a data URI, or have the host allowed")
        return parts, port

    def _connection(self, parts: SplitResult, port: int) -> HTTPConnection:
        host = parts.hostname or ""
        address = self._address(host, port)
        if parts.scheme.lower() == "https":
            return _PinnedHttps(host, port, address, self._timeout, self._tls)
        return _Pinned(host, port, address, self._timeout)

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        """What certificates are checked with; reading those of the system takes longer than many a picture."""
        return ssl.create_default_context()

    def _address(self, host: str, port: int) -> str:
        """Returns an address of a host, having checked all of them."""
        try:
            found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        except (OSError, UnicodeError) as error:
            raise ValueError(f"host {host!r} is not known") from error
        if not all(self._may_connect(ipaddress.ip_address(address.partition("%")[0])) for address in found):
            raise ValueError(f"host {host!r} is at an address that is not public")
        return found[0]

    def _read(self, response: HTTPResponse, deadline: float) -> bytes:
        content = bytearray()
        while part := response.read1(_CHUNK):
            content += part
            if len(content) > self._max_bytes:
                raise ValueError(f"the file at the URL is larger than {self._max_bytes} bytes")
            if time.monotonic() > deadline:
                raise ValueError(f"the file at the URL did not arrive within {self._timeout:g} s")
        return bytes(content)


def is_public(address: Address) -> bool:
    """Whether an address is one of the internet, and does not stand for another address."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped
        if inner is not None:
            return is_public(inner)
        if address.sixtofour or address.teredo or address in _NAT64:
            return False
    return address.is_global and not address.is_multicast


class _Pinned(HTTPConnection):
    """Connects to an address that was checked, whatever the name leads to by now."""

    def __init__(self, host: str, port: int, address: str, timeout: float) -> None:
        super().__init__(host, port, timeout=timeout)
        self._pinned = address

    def connect(self) -> None:
        self.sock = socket.create_connection((self._pinned, self.port), self.timeout)


class _PinnedHttps(HTTPSConnection):
    """The same; the certificate must be that of the name."""

    def __init__(self, host: str, port: int, address: str, timeout: float, tls: ssl.SSLContext) -> None:
        super().__init__(host, port, timeout=timeout, context=tls)
        self._pinned, self._tls = address, tls

    def connect(self) -> None:
        plain = socket.create_connection((self._pinned, self.port), self.timeout)
        self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)
