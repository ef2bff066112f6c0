"""Metrics for Prometheus."""

from __future__ import annotations

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

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._model = Info("bridgetower_model", "The model that is served.", registry=registry)
        self._requests = Counter("bridgetower_requests", "Finished requests.", ("route", "status"), registry=registry)
        self._request_seconds = Histogram(
            "bridgetower_request_seconds",
            "From the first byte of a request to the last of its response.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._batch_items = Histogram(
            "bridgetower_batch_items", "Items computed together.", buckets=_ITEMS, registry=registry
        )
        self._batch_seconds = Histogram(
            "bridgetower_batch_seconds", "Time for a batch.", buckets=_SECONDS, registry=registry
        )
        self._admitted = Gauge("bridgetower_items_admitted", "Items admitted and not yet answered.", registry=registry)

    def watch(self, name: str, fingerprint: str, admitted: Callable[[], int]) -> None:
        """Takes the name of the model, and a function that returns the number of admitted items."""
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
        """Returns all metrics in the format of Prometheus."""
        return generate_latest(self._registry)
