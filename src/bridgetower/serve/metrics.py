"""Figures for Prometheus, and the layer that counts requests."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_CLIENT_LEFT = "499"  # as nginx has it


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._model = Info("bridgetower_model", "The model that is served.", registry=self._registry)
        self._requests = Counter(
            "bridgetower_requests", "Requests answered.", ("route", "status"), registry=self._registry
        )
        self._request_seconds = Histogram(
            "bridgetower_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._batch_items = Histogram(
            "bridgetower_batch_items", "Items computed together.", buckets=_ITEMS, registry=self._registry
        )
        self._batch_seconds = Histogram(
            "bridgetower_batch_seconds", "Time for a batch.", buckets=_SECONDS, registry=self._registry
        )
        self._admitted = Gauge(
            "bridgetower_items_admitted", "Items taken in and not yet answered.", registry=self._registry
        )

    def watch(self, name: str, fingerprint: str, admitted: Callable[[], int]) -> None:
        """Takes the name of the model, and what tells how many items wait."""
        self._model.info({"name": name, "fingerprint": fingerprint})
        self._admitted.set_function(admitted)

    def observe_batch(self, items: int, seconds: float) -> None:
        """Counts a batch."""
        self._batch_items.observe(items)
        self._batch_seconds.observe(seconds)

    def observe_request(self, route: str, status: str, seconds: float) -> None:
        """Counts a request."""
        self._requests.labels(route, status).inc()
        self._request_seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Returns all figures in the format of Prometheus."""
        return generate_latest(self._registry)


class Counting:
    """Counts every request with the route that it took; those that took none share one name."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), _CLIENT_LEFT

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            status = "500"
            raise
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.observe_request(route, status, time.perf_counter() - started)
