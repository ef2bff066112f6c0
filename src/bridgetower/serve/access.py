"""Access to the server: the API key, the names of the server, pages of other sites, proxies."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import time
from collections.abc import Collection, Hashable, Sequence
from urllib.parse import parse_qs

from granian.utils.proxies import wrap_asgi_with_proxy_headers
from starlette.datastructures import Headers
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from bridgetower.serve.config import ServeConfig
from bridgetower.serve.errors import ApiError

OPEN = frozenset({"/health", "/ready", "/v1/health_check"})  # need no key, by GET or HEAD
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:]*)(?::[0-9]*)?")
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})
_VIDEO = re.compile(r"/v1/videos/([0-9a-f]{64})")
_EXPIRY = re.compile(r"[0-9]{1,12}")
_TOKEN_SECONDS = 6 * 3600  # longer than a video plays
_IPV6_PREFIX = 64  # of the addresses of one customer


def video_token(key: str, video: str, expiry: int | None = None) -> str:
    """Returns the signature that a video's address has in place of the key: players send no headers."""
    if expiry is None:
        expiry = int(time.time()) + _TOKEN_SECONDS
    content = f"{video} {expiry}".encode()
    signature = hmac.new(b"video " + key.encode(), content, hashlib.sha256).hexdigest()
    return f"{expiry}-{signature}"


def client_of(scope: Scope) -> Hashable:
    """Returns the sender of a request: its address, of IPv6 the network that one customer has."""
    host = (scope.get("client") or [""])[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a proxy may send a name
        return str(host)
    if address.version == 4:
        return address
    return address.ipv4_mapped or ipaddress.ip_network((address, _IPV6_PREFIX), strict=False)


class AuthMiddleware:
    """Refuses requests without the key before their body is read, and requests that other sites' pages make.

    Without a key, the host of a request must be one of this server's names: others may point here (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, *, config: ServeConfig, page: Collection[str]) -> None:
        self._app = app
        self._page = page
        self._sites = config.cors_origin
        self._key = config.api_key
        self._names = _LOCAL_NAMES | {config.host, *map(str.lower, config.server_name)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = None
        if not self._has_token(scope):
            error = self._error(Headers(scope=scope), scope["method"], scope["path"])
        await (self._app if error is None else error.response(scope))(scope, receive, send)

    def _has_token(self, scope: Scope) -> bool:
        """Tells whether the address is one of a video that the server signed, and not expired."""
        video = _VIDEO.fullmatch(scope["path"])
        if self._key is None or video is None:
            return False
        # As text: of bytes, `parse_qs` takes ASCII only.
        token = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        expiry = token.partition("-")[0]
        if not _EXPIRY.fullmatch(expiry) or int(expiry) < time.time():
            return False
        return _is_equal(token, video_token(self._key, video[1], int(expiry)))

    def _error(self, headers: Headers, method: str, path: str) -> ApiError | None:
        is_reading = method in ("GET", "HEAD")
        if path in OPEN and not is_reading:
            message = f"{method} {path}: expected GET or HEAD"
            return ApiError(405, message, headers={"Allow": "GET, HEAD"})
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._key and _is_equal(key.strip(), self._key):
            return None
        # A browser may open the page by a link on another site.
        fetch = [headers.get(name) for name in ("origin", "sec-fetch-mode", "sec-fetch-dest")]
        is_link = (
            method == "GET" and path in ("/", "/docs") and fetch == [None, "navigate", "document"]
        )
        if not is_link and not self._is_from_here(headers):
            message = (
                "this server answers no other site's pages; allow a site with --cors-origin, and let a proxy in front "
                "of the server pass the header Host with its port"
            )
            return ApiError(403, message, code="other_site")
        if path in OPEN:
            return None
        if self._key is None:
            return self._host_error(headers.get("host", ""))
        if path in self._page and is_reading:
            return None
        message = "the API key is missing or wrong; send the header Authorization: Bearer KEY"
        return ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})

    def _host_error(self, header: str) -> ApiError | None:
        host = _HOST.fullmatch(header)
        if host is not None and host[1].lower() in self._names:
            return None
        message = (
            "without an API key this server answers to the names of this machine only, such as localhost; set a "
            "key, or give its other names with --server-name"
        )
        return ApiError(403, message, code="wrong_host")

    def _is_from_here(self, headers: Headers) -> bool:
        """Tells whether the headers name no sender but this server's own pages, or a site that is allowed.

        By HTTPS and on their own machine browsers compare the addresses themselves, before a proxy may change them.
        """
        origin = headers.get("origin")
        site = headers.get("sec-fetch-site")
        if origin in self._sites or (origin is None and site is None):
            return True
        if site is not None:
            return site in ("same-origin", "none")
        hosts = (headers.get(name, "").lower() for name in ("host", "x-forwarded-host"))
        scheme, _, sender = str(origin).lower().partition("://")
        return scheme in ("http", "https") and sender != "" and sender in hosts


def _is_equal(secret: str, expected: str) -> bool:
    """Compares secrets in a time that tells nothing of them: their digests have one length."""
    digests = [
        hashlib.sha256(text.encode(errors="surrogateescape")).digest()
        for text in (secret, expected)
    ]
    return hmac.compare_digest(*digests)


class ProxyMiddleware:
    """Removes a prefix from the path, and takes the sender from the headers of trusted proxies alone."""

    def __init__(self, app: ASGIApp, *, trusted: Sequence[str], prefix: str) -> None:
        self._app = wrap_asgi_with_proxy_headers(app, list(trusted))
        self._prefix = prefix
        self._trusted = [ipaddress.ip_network(network) for network in trusted]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope = dict(scope)
        if self._prefix and scope["path"] == self._prefix:
            await RedirectResponse(f"{self._prefix}/")(scope, receive, send)
            return
        if self._prefix and scope["path"].startswith(f"{self._prefix}/"):
            scope["path"] = scope["path"].removeprefix(self._prefix)
        client = ipaddress.ip_address(scope["client"][0]) if scope.get("client") else None
        if not any(client in network for network in self._trusted):
            scope["headers"] = [
                (name, value) for name, value in scope["headers"] if name != b"x-forwarded-host"
            ]
        await self._app(scope, receive, send)
