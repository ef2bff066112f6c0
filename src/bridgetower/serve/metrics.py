"""Metrics for Prometheus, the access log, and the ids of requests.

If PROMETHEUS_MULTIPROC_DIR names a folder, the metrics of all processes with it are summed.
"""

from __future__ import annotations

import logging
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bridgetower.files import json_text, shortened

ACCESS_LOG = logging.getLogger("bridgetower.access")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_CLIENT_LEFT = 499  # as nginx has it
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Metrics:
    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        options: dict[str, Any] = {"namespace": "bridgetower", "registry": registry}
        gauge: Any = partial(Gauge, **options, multiprocess_mode="livesum")
        histogram: Any = partial(Histogram, **options, buckets=_SECONDS)
        self.model = gauge("model_info", "Processes that serve the model.", ("name", "fingerprint"))
        self.requests = Counter("requests", "Finished requests.", ("route", "status"), **options)
        help_text = "From the first byte of a request to the last of its response."
        self.request_seconds = histogram("request_seconds", help_text, ("route",))
        self.in_flight = gauge("requests_in_flight", "Requests that are read or answered now.")
        self.admitted = gauge(
            "cost_admitted", "Cost of requests admitted and not yet answered, in pairs."
        )
        self.queued = gauge("cost_queued", "Cost of items that wait for a batch.")
        self.computing = gauge("cost_computing", "Cost of items that are computed now.")
        self.queue_seconds = histogram(
            "queue_seconds", "Time that items of a request waited for a batch."
        )
        self.batch_items = histogram("batch_items", "Items computed together.", buckets=_ITEMS)
        self.batch_seconds = histogram("batch_seconds", "Time for a batch.")
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            self._registry = CollectorRegistry()
            MultiProcessCollector(self._registry)  # type: ignore[no-untyped-call]
        else:
            ProcessCollector(registry=registry)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class ObservingMiddleware:
    """Counts every request with the route that it took, and gives it an id: its header X-Request-ID, or a new one."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, access_log: bool) -> None:
        self._app = app
        self._metrics = metrics
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not _ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        method = scope["method"]
        started = time.perf_counter()
        status = _CLIENT_LEFT
        size = 0

        async def observe_and_send(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                headers["Server"] = "bridgetower"
            size += len(message.get("body", b""))
            await send(message)

        try:
            with self._metrics.in_flight.track_inprogress():
                await self._app(scope, receive, observe_and_send)
        except Exception:
            status = 500 if status == _CLIENT_LEFT else status  # it may have begun
            raise
        finally:
            seconds = time.perf_counter() - started
            route = _route_of(scope)
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.request_seconds.labels(route).observe(seconds)
            if self._access_log:
                line = {
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "request_id": request_id,
                    "client": (scope.get("client") or [None])[0],
                    "method": method,
                    "path": shortened(scope["path"]),
                    "route": route,
                    "status": status,
                    "bytes": size,
                    "seconds": round(seconds, 4),
                }
                ACCESS_LOG.info(json_text(line))


def _route_of(scope: Scope) -> str:
    """Returns the path of the route that a request took, or would have taken had it not been refused."""
    if "route" in scope:
        return str(scope["route"].path)
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    for route in _flat(scope["app"].routes):
        match, _ = route.matches({**scope, "method": method})
        if match is Match.FULL:
            return str(route.path)
    return "none"


def _flat(routes: Iterable[Any]) -> Iterator[Any]:
    """Yields all routes. Newer releases of FastAPI keep included routers apart."""
    for route in routes:
        if hasattr(route, "original_router"):
            yield from _flat(route.original_router.routes)
        else:
            yield route
