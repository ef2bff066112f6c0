"""The API key, the names that a server without one answers to, and what pages of other sites make a browser send."""

import base64
import hmac
import time

import pytest

from bridgetower.serve.access import video_token
from helpers.servers import API_KEY, BEARER, error_of

PATH = "/v1/embeddings"
BODY = {"input": "a bar"}
# which a browser would send by itself
PASSWORD = "Basic " + base64.b64encode(f"me:{API_KEY}".encode()).decode()
LINK = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


@pytest.fixture
def locked_client(locked):
    return locked.client


@pytest.mark.parametrize(
    "key",
    [
        None,
        "",
        "Bearer",
        "Bearer sesame",
        f"Bearer {API_KEY}!",
        API_KEY,
        "Bearer schlüssel".encode("latin-1"),
        PASSWORD,
    ],
)
def test_wrong_keys(locked_client, key):
    headers = {} if key is None else {b"Authorization": key}
    for path in ("/v1/models", "/v1/other", "/other", PATH):
        response = locked_client.request("POST" if path == PATH else "GET", path, headers=headers)
        error = error_of(response, 401)
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"


def test_the_right_key_is_compared_in_constant_time(locked_client, monkeypatch):
    for header in (f"Bearer {API_KEY}", f"bearer  {API_KEY}"):
        assert (
            locked_client.post(PATH, json=BODY, headers={"Authorization": header}).status_code
            == 200
        )
        assert locked_client.get("/metrics", headers={"Authorization": header}).status_code == 200
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(
        hmac,
        "compare_digest",
        lambda left_value, other: (
            compared.append((left_value, other)) or compare(left_value, other)
        ),
    )
    for key in ("s", API_KEY[:-1], API_KEY + "!", API_KEY * 100, API_KEY):
        locked_client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert {len(value) for pair in compared for value in pair} == {32}
    assert [left_value == other for left_value, other in compared] == [False] * 4 + [True]


def test_other_sites_by_their_name(locked_client, client):
    address = client.base_url.netloc.decode()
    for origin in (
        "https://evil.example",
        "null",
        "http://localhost:1",
        f"http://{address}.evil.example",
    ):
        error = error_of(client.post(PATH, json=BODY, headers={"Origin": origin}), 403)
        assert error["code"] == "other_site"
        error_of(locked_client.get("/metrics", headers={"Origin": origin}), 403)
        headers = BEARER | {"Origin": origin}  # which no browser adds by itself
        assert locked_client.post(PATH, json=BODY, headers=headers).status_code == 200
    for headers in (
        {"Origin": f"http://{address}"},
        *({"Sec-Fetch-Site": site} for site in ("same-origin", "none")),
    ):
        assert client.post(PATH, json=BODY, headers=headers).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_sites_without_their_name(locked_client, client, site):
    """As an image, a frame or a script of theirs sends. Only a link to the page is let in."""
    headers = {"Sec-Fetch-Site": site}
    image = {"Sec-Fetch-Mode": "no-cors"}
    frame = LINK | {"Sec-Fetch-Dest": "iframe"}
    for path in ("/", "/v1/models", "/metrics", "/openapi.json", "/health", "/ready", "/other"):
        for extra_headers in (
            {},
            image,
            frame,
            {"Sec-Fetch-Mode": "navigate"},
            *([LINK] if path != "/" else []),
        ):
            for server in (client, locked_client):
                assert (
                    error_of(server.get(path, headers=headers | extra_headers), 403)["code"]
                    == "other_site"
                )
    error_of(client.post(PATH, json=BODY, headers=headers), 403)
    error_of(client.post("/", headers=headers | LINK), 403)
    error_of(client.get("/", headers=headers | LINK | {"Origin": "null"}), 403)
    assert locked_client.get("/v1/models", headers=headers | BEARER).status_code == 200
    for server in (client, locked_client):  # let in: the page needs no key
        assert server.get("/?a=b", headers=LINK | headers).status_code == 200


def test_probes_refuse_bodies_and_names_like_theirs(locked_client):
    for headers in ({}, BEARER, BEARER | {"Host": "]"}):
        response = locked_client.post("/health", content=b"a" * 100_000, headers=headers)
        assert error_of(response, 405)["message"] == "POST /health: expected GET or HEAD"
        assert response.headers["allow"] == "GET, HEAD"
    for path in ("/health//", "/health/", "/health/../v1/models", "/HEALTH"):
        error_of(locked_client.get(path), 401)


def test_odd_queries_are_no_error(locked_client):
    for query in ("x=%C3%A9", "token=%FF", "%FF"):
        assert locked_client.get(f"/health?{query}").status_code == 200


def test_without_a_key_the_description_tells_of_none(client):
    assert "securitySchemes" not in client.get("/openapi.json").json()["components"]


def test_without_a_key_only_names_of_this_machine_are_answered(client, locked_client):
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]", "[::1]:8000"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200
    foreign_hosts = [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "[::2]",
        "[::1",
    ]
    foreign_hosts += [
        "[::1].evil.example",
        "[::1]evil",
        "localhost:evil",
        "127.0.0.1:80.evil",
        "]",
        "[x",
    ]
    for host in foreign_hosts:
        assert (
            error_of(client.get("/v1/models", headers={"Host": host}), 403)["code"] == "wrong_host"
        )
        assert locked_client.get("/v1/models", headers=BEARER | {"Host": host}).status_code == 200


def test_a_token_opens_one_video_for_a_while(locked_client):
    video = "a" * 64
    other = "b" * 64
    now = int(time.time())
    token = video_token(API_KEY, video)
    error = error_of(locked_client.get(f"/v1/videos/{video}?token={token}"), 404)
    assert error["code"] == "no_video"  # of the index
    for path, wrong_token in (
        *((f"videos/{name}", token) for name in (other, video.upper())),
        *((f"{kind}/{video}", token) for kind in ("images", "models")),
        (f"videos/{video}", video_token(API_KEY, video, now - 1)),
        (f"videos/{video}", f"{now + 9999999}-{token.partition('-')[2]}"),
        (f"videos/{video}", video_token("other key", video)),
        *(
            (f"videos/{video}", odd)
            for odd in ("", "-", "a-b", f"{now + 9}-", "%00", "%FF", "%C3%A9", "\xff", "9" * 5000)
        ),
    ):
        assert (
            error_of(locked_client.get(f"/v1/{path}?token={wrong_token}"), 401)["code"]
            == "invalid_api_key"
        ), (path, wrong_token)
    assert 5 * 3600 < int(token.partition("-")[0]) - now < 7 * 3600
