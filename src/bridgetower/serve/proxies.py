"""What reverse proxies change in requests: the path, and who seems to have sent them."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from granian.utils.proxies import wrap_asgi_with_proxy_headers
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send


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
