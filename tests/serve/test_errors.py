"""Errors have one form, tell no more than they should, and a failure of the server does not end it."""

import pytest

from helpers.servers import error_of

PATH = "/v1/embeddings"


def test_unknown_paths_and_methods(client):
    assert error_of(client.get("/v1/other"), 404)["message"] == "GET /v1/other: Not Found"
    assert error_of(client.get(PATH), 405)["code"] == "method_not_allowed"
    assert error_of(client.post("/other", json={}), 404)["type"] == "not_found_error"
    assert [client.head(path).status_code for path in ("/nothing", PATH)] == [404, 405]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Field required"),
        *(
            (content, "not valid JSON")
            for content in (b"{", b'{"input": "a"', b'{"input": "\xff"}')
        ),
        *(
            (content, "not valid JSON")
            for content in (b'{"input": ' + b"9" * 5000 + b"}", b'{"input": "\\ud800"}')
        ),
        (b"[" * 100_000, "not valid JSON: recursion limit"),
        (b"[" * 100_000 + b"]" * 100_000, "not valid JSON: recursion limit"),
        (
            b'{"input": ' + b'{"a":' * 30_000 + b"1" + b"}" * 30_001,
            "not valid JSON: recursion limit",
        ),
        *((content, "should be an object") for content in (b"null", b"[]", b'"text"')),
    ],
)
def test_bodies_that_are_no_requests(client, content, words):
    headers = {"Content-Type": "application/json"}
    assert words in error_of(client.post(PATH, content=content, headers=headers), 400)["message"]


def test_a_failure_is_logged_with_its_id_and_tells_nothing(client, predictor, caplog):
    def fail(*_):
        raise RuntimeError("secret of the inside")

    ask = {"json": {"input": "a"}, "headers": {"X-Request-ID": "unlucky"}}
    hook = predictor.model.text.word_embedding.register_forward_pre_hook(fail)
    try:
        error = error_of(client.post(PATH, **ask), 500)
    finally:
        hook.remove()
    assert error["code"] == "internal_error"
    assert "secret" not in error["message"]
    assert "secret of the inside" in caplog.text
    assert "POST /v1/embeddings failed, request unlucky" in caplog.text
    assert client.post(PATH, **ask).status_code == 200


def test_little_of_a_request_comes_back(client, post_refused):
    response = client.post(PATH, content=b'{"input": "a"}', headers={"Content-Type": "text/plain"})
    assert "with the header Content-Type: application/json" in error_of(response, 400)["message"]
    long = "a" * 3000
    error = post_refused(PATH, input="a", **{long: 1})
    assert (error["param"], error["message"]) == (None, "the body: Extra inputs are not permitted")
    error = post_refused(PATH, messages=[{"role": "user", "content": [{"type": long}]}])
    assert len(error["message"]) < 600
    assert "at most 4096 characters" in post_refused(PATH, input="a", model=long * 2)["message"]
