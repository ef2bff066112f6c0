"""The API key, and the names that a server without one answers to."""

from collections.abc import Iterator

import httpx
import pytest

from bridgetower.predictor import Predictor
from served import error_of, running

KEY = "sesame open"
BODY = {"input": "a bar"}


@pytest.fixture(scope="module")
def locked(predictor: Predictor) -> Iterator[httpx.Client]:
    with running(predictor, api_key=KEY) as client:
        yield client


@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer sesame", f"Basic {KEY}", f"Bearer {KEY}!", KEY])
def test_wrong_keys(locked: httpx.Client, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    for method, path in (
        ("POST", "/v1/embeddings"),
        ("GET", "/v1/models"),
        ("GET", "/openapi.json"),
        ("GET", "/other"),
    ):
        response = locked.request(method, path, headers=headers, json=BODY if method == "POST" else None)
        error = error_of(response, 401)
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"


def test_the_right_key(locked: httpx.Client) -> None:
    for given in (f"Bearer {KEY}", f"bearer  {KEY}"):
        assert locked.post("/v1/embeddings", json=BODY, headers={"Authorization": given}).status_code == 200


def test_a_key_in_another_encoding(locked: httpx.Client) -> None:
    error_of(locked.get("/v1/models", headers={"Authorization": "Bearer schlüssel".encode("latin-1")}), 401)


def test_probes_need_no_key(locked: httpx.Client) -> None:
    assert {locked.get(path).status_code for path in ("/health", "/ready")} == {200}
    for path in ("//health", "/health/", "/health/../v1/models", "/HEALTH"):
        error_of(locked.get(path), 401)


def test_the_description_tells_of_the_key(locked: httpx.Client, client: httpx.Client) -> None:
    description = locked.get("/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert description["paths"]["/v1/embeddings"]["post"]["security"] == [{"key": []}]
    assert "security" not in description["paths"]["/health"]["get"]
    assert "securitySchemes" not in client.get("/openapi.json").json()["components"]


def test_without_a_key_other_names_are_refused(client: httpx.Client, locked: httpx.Client) -> None:
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "[::2]", ""):
        assert error_of(client.get("/v1/models", headers={"Host": host}), 403)["code"] == "wrong_host"
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8000"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200
    headers = {"Host": "photos.example", "Authorization": f"Bearer {KEY}"}
    assert locked.get("/v1/models", headers=headers).status_code == 200
