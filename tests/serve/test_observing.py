"""Ids of requests, and the access log."""

import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from bridgetower.predictor import Predictor
from bridgetower.serve.metrics import ACCESS_LOG
from bridgetower.serve.service import Service
from served import error_of, running, until

NEW = re.compile("[0-9a-f]{32}")


@pytest.fixture(scope="module")
def logging_client(predictor: Predictor) -> Iterator[httpx.Client]:
    with running(predictor, access_log=True, api_key="secret", forwarded_allow_ips=("127.0.0.1",)) as client:
        yield client


@pytest.fixture
def lines() -> Iterator[Callable[[int], list[dict[str, Any]]]]:
    """Returns the entries of the access log once there are so many."""
    found: list[str] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    def wait(count: int) -> list[dict[str, Any]]:
        until(lambda: len(found) >= count)
        assert len(found) == count
        return list(map(json.loads, found))

    handler, level = Keeping(), ACCESS_LOG.level
    ACCESS_LOG.addHandler(handler)
    ACCESS_LOG.setLevel(logging.INFO)
    yield wait
    ACCESS_LOG.removeHandler(handler)
    ACCESS_LOG.setLevel(level)


@pytest.mark.parametrize("given", ["a", "7f3c-9:b_2.C", "x" * 128])
def test_an_id_is_kept(client: httpx.Client, given: str) -> None:
    for path in ("/health", "/v1/models", "/nowhere"):
        assert client.get(path, headers={"X-Request-ID": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, '"}', "é".encode()])
def test_other_ids_are_replaced(client: httpx.Client, given: Any) -> None:
    headers = {} if given is None else {"X-Request-ID": given}
    ids = {client.get("/health", headers=headers).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(NEW.fullmatch(one) for one in ids)


def test_a_line_for_each_request(logging_client: httpx.Client, lines: Callable[[int], list[dict[str, Any]]]) -> None:
    key = {"Authorization": "Bearer secret"}
    answer = logging_client.post("/v1/embeddings", json={"input": "a bar"}, headers=key | {"X-Request-ID": "mine"})
    error_of(logging_client.post("/v1/embeddings", json={"input": "a bar"}), 401)
    error_of(logging_client.get("/a%0Ab\u202ec?key=private", headers=key | {"X-Forwarded-For": "203.0.113.9"}), 404)
    first, *others = lines(3)
    second, third = sorted(others, key=lambda line: line["status"])  # what is refused has its body read afterwards
    assert first.pop("seconds") > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("time"))
    assert first == {
        "request_id": "mine",
        "client": "127.0.0.1",
        "method": "POST",
        "path": "/v1/embeddings",
        "route": "/v1/embeddings",
        "status": 200,
        "bytes": len(answer.content),
    }
    assert (second["status"], second["route"]) == (401, "none")
    assert (third["status"], third["path"], third["client"]) == (404, "/a\nb\u202ec", "203.0.113.9")


def test_no_line_unless_it_is_asked_for(client: httpx.Client, lines: Callable[[int], list[dict[str, Any]]]) -> None:
    client.get("/health")
    assert lines(0) == []


def test_a_failure_is_logged_with_its_id(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running(predictor) as client:
        monkeypatch.setattr(Service, "models", property(lambda self: 1 / 0))
        error_of(client.get("/v1/models", headers={"X-Request-ID": "unlucky"}), 500)
    assert "GET /v1/models failed, request unlucky" in caplog.text
