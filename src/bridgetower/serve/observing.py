"""What is noted of every request: metrics, an id, a line of the access log."""

from __future__ import annotations

import logging
import re
import time
import uuid
from datetime import UTC, datetime

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bridgetower.files import json_text, shortened
from bridgetower.serve.errors import id_of
from bridgetower.serve.metrics import Metrics, held

ACCESS_LOG = logging.getLogger("bridgetower.access")

_CLIENT_LEFT = 499  # as nginx has it
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class ObservingMiddleware:
    """Counts every request with the route that it took; those that took none share one name.

    The id of a request is its header X-Request-ID if that has 1 to 128 letters, digits and `._:-`, else a new one. The
    response has it too.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, access_log: bool) -> None:
        self._app, self._metrics, self._access_log = app, metrics, access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        scope.setdefault("state", {})["request_id"] = given if _ID.fullmatch(given) else uuid.uuid4().hex
        started, status, size, method = time.perf_counter(), _CLIENT_LEFT, 0, scope["method"]

        async def noting(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"], headers["Server"] = id_of(scope), "bridgetower"
            size += len(message.get("body", b""))
            await send(message)

        try:
            with held(self._metrics.in_flight):
                await self._app(scope, receive, noting)
        except Exception:
            status = 500 if status == _CLIENT_LEFT else status  # it may have begun
            raise
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.observe_request(route, str(status), seconds)
            if self._access_log:
                ACCESS_LOG.info(_line(scope, method, route, status, size, seconds))


def _line(scope: Scope, method: str, route: str, status: int, size: int, seconds: float) -> str:
    return json_text(
        {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": id_of(scope),
            "client": (scope.get("client") or [None])[0],
            "method": method,
            "path": shortened(scope["path"]),
            "route": route,
            "status": status,
            "bytes": size,
            "seconds": round(seconds, 4),
        }
    )
