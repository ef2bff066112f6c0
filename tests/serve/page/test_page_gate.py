"""What does not come through to Gradio."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from bridgetower.predictor import Predictor
from bridgetower.serve.page.gate import names_url
from served import error_of, running

pytest.importorskip("gradio")

JOIN = "/gradio_api/queue/join"


@pytest.fixture(scope="module")
def client(predictor: Predictor) -> Iterator[httpx.Client]:
    with running(predictor, page=True) as found:
        yield found


@pytest.mark.parametrize(
    "path",
    [
        *("/gradio_api/proxy=https://pictures.example", "/gradio_api/run/match", "/gradio_api/call/match", "/docs"),
        *("/gradio_api/heartbeat/abc", "/gradio_api/component_server", "/monitoring", "/gradio_api/info", "/login"),
        *("/deep_link", "/gradio_api/runs", "/gradio_api/stream/a", "/gradio_api/file"),
    ],
)
def test_other_routes_of_gradio(client: httpx.Client, path: str) -> None:
    for method in ("GET", "POST"):
        response = client.request(method, path, json={} if method == "POST" else None)
        assert response.status_code in (404, 405)
    assert error_of(client.get("/gradio_api/info"), 404)["message"] == "GET /gradio_api/info: Not Found"


@pytest.mark.parametrize(
    "body",
    [
        *(None, 7, [], {}, "text"),
        {"data": [], "fn_index": 0, "session_hash": "a"},
        {"data": [None, "a"], "fn_index": 99, "session_hash": "a"},
        {"data": [None, "a"], "fn_index": "0", "session_hash": "a"},
        {"data": [None, "a"], "fn_index": [0], "session_hash": "a"},
        {"data": [None, "a"], "fn_index": 0, "session_hash": 7},
        {"data": "ab", "fn_index": 0, "session_hash": "a"},
    ],
)
def test_presses_of_no_button(client: httpx.Client, body: Any) -> None:
    assert "button" in error_of(client.post(JOIN, json=body), 400)["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff"])
def test_bodies_that_are_no_json(client: httpx.Client, content: bytes) -> None:
    error_of(client.post(JOIN, content=content), 400)


def test_a_press_of_a_button(client: httpx.Client) -> None:
    body = {"data": [None, "a"], "fn_index": 0, "session_hash": "a", "event_data": {"more": 1}, "trigger_id": "odd"}
    assert client.post(JOIN, json=body).json().keys() == {"event_id"}


def test_names_of_urls() -> None:
    for value in ({"path": "http://a"}, [{"deep": {"path": "ftp://a"}}], {"path": {"odd": "https://a"}}):
        assert names_url(value)
    for value in ({"path": "/a/b.png"}, "http://a", ["http://a"], None, {"url": "http://a", "path": "/a"}):
        assert not names_url(value)
