"""What reverse proxies change in requests: the path, and who seems to have sent them."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware


class ProxyMiddleware(ProxyHeadersMiddleware):
    """Takes a prefix off the path, and the sender from the headers of trusted proxies.

    `X-Forwarded-For` gives the address of the client, `X-Forwarded-Proto` the scheme. `X-Forwarded-Host` is left where
    a trusted proxy sent it, and removed elsewhere.
    """

    def __init__(self, app: ASGIApp, *, trusted: Sequence[str], prefix: str) -> None:
        """Wraps an application.

        Args:
            app: The application.
            trusted: Addresses and networks of proxies.
            prefix: Of the paths that clients use, such as /photos; a proxy may have removed it already.
        """
        super().__init__(app, list(trusted))  # type: ignore[arg-type]  # its types of an application are its own
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # type: ignore[override]
        """Passes a request on; one for the prefix itself is redirected to the page below it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)  # type: ignore[arg-type]
            return
        scope = dict(scope)
        if self._prefix and scope["path"] == self._prefix:
            await RedirectResponse(f"{self._prefix}/")(scope, receive, send)
            return
        if self._prefix and scope["path"].startswith(f"{self._prefix}/"):
            scope["path"] = scope["path"].removeprefix(self._prefix)
        if not scope.get("client") or scope["client"][0] not in self.trusted_hosts:
            scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"x-forwarded-host"]
        await super().__call__(scope, receive, send)  # type: ignore[arg-type]
