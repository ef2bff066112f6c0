"""Who may send requests: the API key, the names that the server answers to, pages of other sites, proxies."""

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
    """Returns what stands in a video's address in place of the key: players send no headers."""
    expiry = int(time.time()) + _TOKEN_SECONDS if expiry is None else expiry
    signature = hmac.new(
        b"video " + key.encode(), f"{video} {expiry}".encode(), hashlib.sha256
    ).hexdigest()
    return f"{expiry}-{signature}"


def client_of(scope: Scope) -> Hashable:
    """Returns whom a request is from: its address, of IPv6 the network that one customer has."""
    host = (scope.get("client") or [""])[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a proxy may send a name
        return str(host)
    if address.version == 4:
        return address
    return address.ipv4_mapped or ipaddress.ip_network((address, _IPV6_PREFIX), strict=False)


class AuthMiddleware:
    """Refuses requests without the key, before their body is read, and what pages of other sites make browsers send.

    Without a key, the host of a request must be one of this server's names: others may point here (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, *, config: ServeConfig, page: Collection[str]) -> None:
        self._app, self._page, self._sites, self._key = (
            app,
            page,
            config.cors_origin,
            config.api_key,
        )
        self._digest = (
            None if config.api_key is None else hashlib.sha256(config.api_key.encode()).digest()
        )
        self._names = _LOCAL_NAMES | {config.host, *map(str.lower, config.server_name)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = None
        if not self._has_token(scope):
            error = self._error(Headers(scope=scope), scope["method"], scope["path"])
        await (self._app if error is None else error.response(scope))(scope, receive, send)

    def _has_token(self, scope: Scope) -> bool:
        """Whether the address is one of a video that the server signed, and not expired."""
        video = _VIDEO.fullmatch(scope["path"])
        if self._key is None or video is None:
            return False
        # of bytes it takes ASCII only
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        expiry = given.partition("-")[0]
        if not _EXPIRY.fullmatch(expiry):
            return False
        expected = video_token(self._key, video[1], int(expiry))
        return int(expiry) >= time.time() and hmac.compare_digest(given.encode(), expected.encode())

    def _error(self, headers: Headers, method: str, path: str) -> ApiError | None:
        if path in OPEN and method not in ("GET", "HEAD"):
            return ApiError(
                405, f"{method} {path}: expected GET or HEAD", headers={"Allow": "GET, HEAD"}
            )
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._digest is not None:
            digest = hashlib.sha256(given.strip().encode(errors="surrogateescape")).digest()
            # of one length, in the same time for any key
            if hmac.compare_digest(digest, self._digest):
                return None
        fetch = (
            headers.get("origin"),
            headers.get("sec-fetch-mode"),
            headers.get("sec-fetch-dest"),
        )
        is_link = (
            method == "GET" and path in ("/", "/docs") and fetch == (None, "navigate", "document")
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
            host = _HOST.fullmatch(headers.get("host", ""))
            message = (
                "without an API key this server answers to the names of this machine only, such as localhost; set a "
                "key, or give its other names with --server-name"
            )
            is_local = host is not None and host[1].lower() in self._names
            return None if is_local else ApiError(403, message, code="wrong_host")
        if path in self._page and method in ("GET", "HEAD"):
            return None
        message = "the API key is missing or wrong; send the header Authorization: Bearer KEY"
        return ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})

    def _is_from_here(self, headers: Headers) -> bool:
        """Whether the headers name no other site's page, or one that is allowed, as the sender.

        By HTTPS and on their own machine browsers compare the addresses themselves, before a proxy may change them.
        """
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin in self._sites or (origin is None and site is None):
            return True
        if site is not None:
            return site in ("same-origin", "none")
        hosts = [headers.get(name, "").lower() for name in ("host", "x-forwarded-host")]
        return str(origin).lower() in [
            f"{scheme}://{host}" for scheme in ("http", "https") for host in hosts if host
        ]


class ProxyMiddleware:
    """Takes a prefix off the path, and the sender from the headers of trusted proxies; others lose X-Forwarded-Host."""

    def __init__(self, app: ASGIApp, *, trusted: Sequence[str], prefix: str) -> None:
        self._app, self._prefix = wrap_asgi_with_proxy_headers(app, list(trusted)), prefix
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
