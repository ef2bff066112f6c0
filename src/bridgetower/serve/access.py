"""Who may ask: the API key, and the names that a server without one answers to."""

from __future__ import annotations

import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from bridgetower.serve.errors import ApiError

OPEN = frozenset({"/health", "/ready"})
"""Paths that tell nothing and need no key."""

_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})


class Access:
    """Turns away who has not the key, before anything else of a request is read.

    A server without a key answers only to requests for this machine by one of its own names. Otherwise a page in a
    browser on it could ask for a name of its own that it has pointed here (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, host: str) -> None:
        self._app, self._names = app, _LOCAL_NAMES | {host}
        self._key = None if api_key is None else _digest(api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on or refuses it."""
        if scope["type"] != "lifespan" and scope["path"] not in OPEN and (error := self._error(Headers(scope=scope))):
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _error(self, headers: Headers) -> ApiError | None:
        if self._key is None:
            return None if _name(headers.get("host", "")) in self._names else _wrong_name()
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(_digest(given.strip()), self._key):
            return None
        message = "the API key is missing or wrong; send the header Authorization: Bearer KEY"
        return ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})


def _digest(key: str) -> bytes:
    """Of one length, so that comparing takes the same time for any key."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()


def _wrong_name() -> ApiError:
    message = "without an API key this server answers to the names of this machine only, such as localhost"
    return ApiError(403, message, code="wrong_host")
