"""Who may send requests: the API key, the names that the server answers to, pages of other sites, proxies."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import re
import time
from collections.abc import Collection, Sequence
from functools import partial
from urllib.parse import parse_qs

from granian.utils.proxies import wrap_asgi_with_proxy_headers
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from bridgetower.serve.config import ServeConfig
from bridgetower.serve.errors import ApiError

OPEN = frozenset({"/health", "/ready"})
"""Paths that need no key, by GET or HEAD."""

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:]*)(?::[0-9]*)?")
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})


_VIDEO = re.compile(r"/v1/videos/([0-9a-f]{64})")
_TOKEN_SECONDS = 6 * 3600  # longer than a video plays


def video_token(key: str, video: str, expiry: int | None = None) -> str:
    """Returns what stands in a video's address in place of the key: players send no headers."""
    expiry = int(time.time()) + _TOKEN_SECONDS if expiry is None else expiry
    signature = hmac.new(b"video " + key.encode(), f"{video} {expiry}".encode(), hashlib.sha256).hexdigest()
    return f"{expiry}-{signature}"


class AuthMiddleware:
    """Refuses requests without the key, before their body is read.

    A browser sends the key as a password, also in requests that a page of another site makes, and it reaches a server
    without a key on its own machine. So requests from pages of other sites are refused, and a server without a key
    accepts only requests whose host is one of its names (another name may point here: DNS rebinding).
    """

    def __init__(self, app: ASGIApp, *, config: ServeConfig, page: Collection[str]) -> None:
        self._app, self._page, self._sites = app, page, config.cors_origin
        self._names = _LOCAL_NAMES | {config.host, *map(str.lower, config.server_name)}
        self._key = None if config.api_key is None else _digest(config.api_key)
        self._signs = partial(video_token, config.api_key or "")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on or refuses it."""
        if (
            scope["type"] == "http"
            and not self._has_token(scope)
            and (error := self._error(Headers(scope=scope), scope["method"], scope["path"]))
        ):
            await error.response(scope)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _has_token(self, scope: Scope) -> bool:
        """Whether the address is one of a video that the server signed, and not expired."""
        video, given = _VIDEO.fullmatch(scope["path"]), parse_qs(scope["query_string"]).get(b"token", [b""])[0]
        expiry = given.partition(b"-")[0]
        if self._key is None or video is None or not re.fullmatch(rb"[0-9]{1,12}", expiry):
            return False
        expected = self._signs(video[1], int(expiry)).encode()
        return int(expiry) >= time.time() and hmac.compare_digest(given, expected)

    def _error(self, headers: Headers, method: str, path: str) -> ApiError | None:
        if path in OPEN and method not in ("GET", "HEAD"):
            return ApiError(405, f"{method} {path}: expected GET or HEAD", headers={"Allow": "GET, HEAD"})
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if self._key is not None and scheme.lower() == "bearer" and self._is_key(given.strip()):
            return None
        if not self._is_from_here(headers) and not _is_link(headers, method, path):
            message = (
                "this server answers no other site's pages; allow a site with --cors-origin, and let a proxy in front "
                "of the server pass the header Host with its port"
            )
            return ApiError(403, message, code="other_site")
        if path in OPEN:
            return None
        if self._key is None:
            message = (
                "without an API key this server answers to the names of this machine only, such as localhost; set a "
                "key, or give its other names with --server-name"
            )
            is_local = _name(headers.get("host", "")) in self._names
            return None if is_local else ApiError(403, message, code="wrong_host")
        if path in self._page:
            return None
        if path.startswith(("/v1/", "/v2/", "/rerank")):
            message = "the API key is missing or wrong; send the header Authorization: Bearer KEY"
            return ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})
        if scheme.lower() == "basic" and self._is_key(_password(given.strip())):
            return None
        message = "the API key is missing or wrong; give it as the password, with any name"
        return ApiError(
            401, message, headers={"WWW-Authenticate": 'Basic realm="BridgeTower: the password is the key"'}
        )

    def _is_from_here(self, headers: Headers) -> bool:
        """Whether the headers do not name a page of another site as the sender, except those that are allowed.

        Browsers compare the addresses themselves, before a proxy may change them, and send the result if they reach
        the server by HTTPS or on their own machine.
        """
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin in self._sites or (origin is None and site is None):
            return True
        if site is not None:
            return site in ("same-origin", "none")
        hosts = [headers.get(name, "").lower() for name in ("host", "x-forwarded-host")]
        return str(origin).lower() in [f"{scheme}://{host}" for scheme in ("http", "https") for host in hosts if host]

    def _is_key(self, given: str) -> bool:
        return self._key is not None and hmac.compare_digest(_digest(given), self._key)


def _digest(key: str) -> bytes:
    """Of one length, so that a comparison takes the same time for any key."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _password(credentials: str) -> str:
    """The password in what a browser sends."""
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _is_link(headers: Headers, method: str, path: str) -> bool:
    """Whether the headers are those of a link to a page, which a browser opens in a window of its own."""
    given = (headers.get("origin"), headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest"))
    return method == "GET" and path in ("/", "/docs") and given == (None, "navigate", "document")


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    found = _HOST.fullmatch(host)
    return found[1].lower() if found else ""


class CrossOriginMiddleware(CORSMiddleware):
    """Lets pages of the given sites read responses; requests of all others pass unchanged."""

    def __init__(self, app: ASGIApp, *, sites: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=sites,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on or refuses it."""
        known = scope["type"] == "http" and Headers(scope=scope).get("origin") in self.allow_origins
        await (super().__call__ if known else self.app)(scope, receive, send)


class ProxyMiddleware:
    """Takes a prefix off the path, and the sender from the headers of trusted proxies.

    `X-Forwarded-For` gives the address of the client, `X-Forwarded-Proto` the scheme. `X-Forwarded-Host` is left where
    a trusted proxy sent it, and removed elsewhere.
    """

    def __init__(self, app: ASGIApp, *, trusted: Sequence[str], prefix: str) -> None:
        self._app, self._prefix = wrap_asgi_with_proxy_headers(app, list(trusted)), prefix
        self._trusted = [ipaddress.ip_network(network) for network in trusted]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on; one for the prefix itself is redirected to the page below it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = dict(scope)
        if self._prefix and scope["path"] == self._prefix:
            await RedirectResponse(f"{self._prefix}/")(scope, receive, send)
            return
        if self._prefix and scope["path"].startswith(f"{self._prefix}/"):
            scope["path"] = scope["path"].removeprefix(self._prefix)
        client = ipaddress.ip_address(scope["client"][0]) if scope.get("client") else None
        if not any(client in network for network in self._trusted):
            scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"x-forwarded-host"]
        await self._app(scope, receive, send)
