"""Who may ask: the API key, and the names that a server without one answers to."""

from __future__ import annotations

import base64
import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from bridgetower.serve import page
from bridgetower.serve.errors import ApiError

API = "/v1/"
"""Begins the paths that programs ask."""

PAGE = "/"
"""The path that links of other sites may lead to."""

OPEN = frozenset({"/health", "/ready"})
"""Paths that tell nothing and need no key, by GET or HEAD."""

_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})


class Access:
    """Turns away who has not the key, before anything else of a request is read.

    A browser has no key to send but asks for a password, which is the key. It would send it for any other site too, and
    reach a server without a key on its own machine; so what another site makes it send is refused, and a server without
    a key answers only to requests for this machine by one of its own names (another name may have been pointed here:
    DNS rebinding).
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, host: str) -> None:
        self._app, self._names = app, _LOCAL_NAMES | {host}
        self._key = None if api_key is None else _digest(api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on or refuses it."""
        if scope["type"] == "http" and (error := self._error(Headers(scope=scope), scope["method"], scope["path"])):
            await error.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _error(self, headers: Headers, method: str, path: str) -> ApiError | None:
        if path in OPEN and method not in ("GET", "HEAD"):
            return ApiError(405, f"{method} {path}: expected GET or HEAD", headers={"Allow": "GET, HEAD"})
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if self._key is not None and scheme.lower() == "bearer" and self._is_key(given.strip()):
            return None
        if not _from_here(headers) and not _is_link(headers, method, path):
            return ApiError(403, "this server answers no other site's pages", code="other_site")
        if path in OPEN:
            return None
        if self._key is None:
            return None if _name(headers.get("host", "")) in self._names else _wrong_name()
        if path in page.FILES:
            return None
        if path.startswith(API):
            message = "the API key is missing or wrong; send the header Authorization: Bearer KEY"
            return ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})
        if scheme.lower() == "basic" and self._is_key(_password(given.strip())):
            return None
        message = "the API key is missing or wrong; give it as the password, with any name"
        return ApiError(
            401, message, headers={"WWW-Authenticate": 'Basic realm="BridgeTower: the password is the key"'}
        )

    def _is_key(self, given: str) -> bool:
        return self._key is not None and hmac.compare_digest(_digest(given), self._key)


def _digest(key: str) -> bytes:
    """Of one length, so that comparing takes the same time for any key."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _password(credentials: str) -> str:
    """The password in what a browser sends."""
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _from_here(headers: Headers) -> bool:
    """Whether no browser says that another site's page has sent a request."""
    origin = headers.get("origin")
    if origin is None:
        return headers.get("sec-fetch-site") not in ("cross-site", "same-site")
    return origin.partition("://")[2].lower() == headers.get("host", "").lower()


def _is_link(headers: Headers, method: str, path: str) -> bool:
    """Whether a browser says that it goes to the page, such as by a link of another site, and shows it alone."""
    said = (headers.get("origin"), headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest"))
    return method == "GET" and path == PAGE and said == (None, "navigate", "document")


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()


def _wrong_name() -> ApiError:
    message = "without an API key this server answers to the names of this machine only, such as localhost"
    return ApiError(403, message, code="wrong_host")
