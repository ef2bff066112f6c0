"""Ids of requests, the access log, and figures that count what happened."""

import contextlib
import json
import logging
import re

import pytest
from starlette.applications import Starlette

from bridgetower.serve.metrics import ACCESS_LOG, Metrics, ObservingMiddleware
from helpers.servers import BEARER, SERVED_TEXTS, error_of, wait_until

NEW = re.compile("[0-9a-f]{32}")


@pytest.fixture
def lines():
    messages = []

    class Keeping(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    def wait(count):
        wait_until(lambda: len(messages) >= count)
        assert len(messages) == count
        return list(map(json.loads, messages))

    handler = Keeping()
    level = ACCESS_LOG.level
    ACCESS_LOG.addHandler(handler)
    ACCESS_LOG.setLevel(logging.INFO)
    yield wait
    ACCESS_LOG.removeHandler(handler)
    ACCESS_LOG.setLevel(level)


def test_ids_are_kept_or_replaced(client):
    for request_id in ("a", "7f3c-9:b_2.C", "x" * 128):
        for path in ("/health", "/v1/models", "/nowhere"):
            assert (
                client.get(path, headers={"X-Request-ID": request_id}).headers["x-request-id"]
                == request_id
            )
    odd = [
        {},
        *(
            {"X-Request-ID": request_id}
            for request_id in ("", "a b", "x" * 129, '"}', "é".encode())
        ),
    ]
    ids = {client.get("/health", headers=headers).headers["x-request-id"] for headers in odd * 2}
    assert len(ids) == 2 * len(odd)
    assert all(NEW.fullmatch(request_id) for request_id in ids)


def test_a_line_for_each_request_where_it_is_asked_for(server, locked, lines):
    client = locked.client
    server.client.get("/health")
    answer = client.post(
        "/v1/embeddings", json={"input": "a bar"}, headers=BEARER | {"X-Request-ID": "mine"}
    )
    error_of(client.post("/v1/embeddings", json={"input": "a bar"}), 401)
    error_of(
        client.get(
            "/a%0Ab\u202ec?key=private", headers=BEARER | {"X-Forwarded-For": "203.0.113.9"}
        ),
        404,
    )
    first, *later = lines(3)
    # what is refused has its body read afterwards
    second, third = sorted(later, key=lambda line: line["status"])
    assert first.pop("seconds") > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("time"))
    route = {"method": "POST", "path": "/v1/embeddings", "route": "/v1/embeddings", "status": 200}
    assert first == route | {
        "request_id": "mine",
        "client": "127.0.0.1",
        "bytes": len(answer.content),
    }
    assert (second["status"], second["route"]) == (401, "/v1/embeddings")
    assert (third["status"], third["path"], third["client"]) == (404, "/a\nb\u202ec", "203.0.113.9")


def metric_values(client):
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = re.findall(r"^([^#\n].*) (\S+)$", response.text, re.MULTILINE)
    return {name: float(value) for name, value in lines}


def test_requests_batches_and_memory(client, predictor):
    before = metric_values(client)
    for body in ({"input": SERVED_TEXTS * 6}, {"input": "a"}, {"input": 7}):
        client.post("/v1/embeddings", json=body)
    for path in ("/v1/models/tiny", "/nowhere/1", "/nowhere/2"):
        client.get(path)
    after = metric_values(client)
    gained = {name: value - before.get(name, 0) for name, value in after.items()}
    for route, status, count in (
        ("/v1/embeddings", 200, 2),
        ("/v1/embeddings", 400, 1),
        ("/v1/models/{name:path}", 200, 1),
        ("none", 404, 2),
    ):
        assert gained[f'bridgetower_requests_total{{route="{route}",status="{status}"}}'] == count
    assert gained['bridgetower_request_seconds_count{route="/v1/embeddings"}'] == 3
    assert gained["bridgetower_batch_items_sum"] == 19
    assert gained["bridgetower_batch_items_count"] == gained["bridgetower_queue_seconds_count"] == 3
    for name in ("cost_admitted", "cost_queued", "cost_computing"):
        assert after[f"bridgetower_{name}"] == 0
    assert after["bridgetower_requests_in_flight"] == 1  # this one
    assert after["process_resident_memory_bytes"] > 10**7
    assert (
        after[f'bridgetower_model_info{{fingerprint="{predictor.fingerprint}",name="tiny"}}'] == 1
    )


REFUSED = [
    ("POST", "/v1/embeddings", {}, "/v1/embeddings", 401),
    ("HEAD", "/v1/models/a/b", {}, "/v1/models/{name:path}", 401),
    ("POST", "/v1/models", {}, "none", 401),
    ("GET", "/v1/nothing", {}, "none", 401),
    ("GET", "/v1/index", {"Origin": "https://evil.example"}, "/v1/index", 403),
    ("GET", "/health", {"Content-Length": "1"}, "/health", 400),
]


@pytest.mark.parametrize(("method", "path", "headers", "route", "status"), REFUSED)
def test_what_is_refused_counts_under_its_route(locked, method, path, headers, route, status):
    counter = locked.service.metrics.requests.labels(route, str(status))._value
    before = counter.get()
    content = b"a" if headers.get("Content-Length") else None
    assert (
        locked.client.request(method, path, headers=headers, content=content).status_code == status
    )
    wait_until(lambda: counter.get() == before + 1)


STARTED = {"type": "http.response.start", "status": 200, "headers": []}


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("messages", "fails", "status"),
    [([], True, 500), ([STARTED], True, 200), ([], False, 499), ([STARTED], False, 200)],
)
async def test_failures_and_clients_that_left_have_their_status(messages, fails, status):
    metrics = Metrics()

    async def app(scope, receive, send):
        for message in messages:
            await send(dict(message))
        if fails:
            raise RuntimeError("a")

    async def ignore(message=None):
        pass

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "app": Starlette()}
    with contextlib.suppress(RuntimeError):
        await ObservingMiddleware(app, metrics=metrics, access_log=False)(scope, ignore, ignore)
    assert f'requests_total{{route="none",status="{status}"}} 1.0' in metrics.text().decode()
