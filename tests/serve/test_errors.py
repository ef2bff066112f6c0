"""Errors have one form, tell no more than they should, and a failure of the server does not end it."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from bridgetower.predictor import Predictor
from served import error_of


def test_unknown_paths_and_methods(client: httpx.Client) -> None:
    assert error_of(client.get("/v1/other"), 404)["message"] == "GET /v1/other: Not Found"
    error = error_of(client.get("/v1/embeddings"), 405)
    assert error["code"] == "method_not_allowed"
    assert error_of(client.post("/other", json={}), 404)["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Field required"),
        (b"{", "not valid JSON"),
        (b'{"input": "a"', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON: recursion limit"),
        (b"[" * 100_000 + b"]" * 100_000, "not valid JSON: recursion limit"),
        (b'{"input": ' + b'{"a":' * 30_000 + b"1" + b"}" * 30_001, "not valid JSON: recursion limit"),
        (b'{"input": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"input": "\xff"}', "not valid JSON"),
        (b'{"input": "\\ud800"}', "not valid JSON"),
        (b"null", "should be an object"),
        (b"[]", "should be an object"),
        (b'"text"', "should be an object"),
    ],
)
def test_bodies_that_are_no_requests(client: httpx.Client, content: bytes, words: str) -> None:
    headers = {"Content-Type": "application/json"}
    message = error_of(client.post("/v1/embeddings", content=content, headers=headers), 400)["message"]
    assert words in message


def test_json_under_another_name(client: httpx.Client) -> None:
    response = client.post("/v1/embeddings", content=b'{"input": "a"}', headers={"Content-Type": "text/plain"})
    assert "with the header Content-Type: application/json" in error_of(response, 400)["message"]


def test_a_failure_is_logged_with_its_id_and_tells_nothing(
    client: httpx.Client, predictor: Predictor, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret of the inside")

    ask = {"json": {"input": "a"}, "headers": {"X-Request-ID": "unlucky"}}
    hook = predictor.model.text.word_embedding.register_forward_pre_hook(fail)
    try:
        error = error_of(client.post("/v1/embeddings", **ask), 500)
    finally:
        hook.remove()
    assert error["code"] == "internal_error"
    assert "secret" not in error["message"]
    assert "secret of the inside" in caplog.text
    assert "POST /v1/embeddings failed, request unlucky" in caplog.text
    assert client.post("/v1/embeddings", **ask).status_code == 200


def test_little_of_a_request_comes_back(refused: Callable[..., dict[str, Any]]) -> None:
    long = "a" * 3000
    error = refused("/v1/embeddings", input="a", **{long: 1})
    assert (error["param"], error["message"]) == (None, "the body: Extra inputs are not permitted")
    error = refused("/v1/embeddings", messages=[{"role": "user", "content": [{"type": long}]}])
    assert len(error["message"]) < 600
    assert "at most 4096 characters" in refused("/v1/embeddings", input="a", model=long * 2)["message"]
