"""Metrics for Prometheus; if PROMETHEUS_MULTIPROC_DIR names a folder, those of all processes with it are summed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

SHARED = "PROMETHEUS_MULTIPROC_DIR"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The metrics of one server.

    Attributes:
        in_flight: Number of requests that are read or answered.
        admitted: Number of items that are admitted and not yet answered.
        queued: Number of items that wait for a batch.
        computing: Number of items in the batch.
        queue_seconds: How long items waited for a batch.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def gauge(name: str, help_text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"bridgetower_{name}", help_text, labels, registry=registry, multiprocess_mode="livesum")

        def seconds(name: str, help_text: str, labels: tuple[str, ...] = ()) -> Histogram:
            return Histogram(f"bridgetower_{name}", help_text, labels, buckets=_SECONDS, registry=registry)

        self._model = gauge("model_info", "Processes that serve the model.", ("name", "fingerprint"))
        self._requests = Counter("bridgetower_requests", "Finished requests.", ("route", "status"), registry=registry)
        self._request_seconds = seconds(
            "request_seconds", "From the first byte of a request to the last of its response.", ("route",)
        )
        self.in_flight = gauge("requests_in_flight", "Requests that are read or answered now.")
        self.admitted = gauge("items_admitted", "Items admitted and not yet answered.")
        self.queued = gauge("items_queued", "Items that wait for a batch.")
        self.computing = gauge("items_computing", "Items that are computed now.")
        self.queue_seconds = seconds("queue_seconds", "Time that items of a request waited for a batch.")
        self._batch_items = Histogram(
            "bridgetower_batch_items", "Items computed together.", buckets=_ITEMS, registry=registry
        )
        self._batch_seconds = seconds("batch_seconds", "Time for a batch.")
        if SHARED in os.environ:
            self._registry = CollectorRegistry()
            MultiProcessCollector(self._registry)  # type: ignore[no-untyped-call]
        else:
            ProcessCollector(registry=registry)

    def describe(self, name: str, fingerprint: str) -> None:
        """Takes the name of the model."""
        self._model.labels(name, fingerprint).set(1)

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


@contextmanager
def held(gauge: Gauge, count: int = 1) -> Iterator[None]:
    """Raises a gauge during the block."""
    gauge.inc(count)
    try:
        yield
    finally:
        gauge.dec(count)
