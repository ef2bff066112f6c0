"""The API key, the names that a server without one answers to, and what pages of other sites make a browser send."""

import base64
import hmac
import time

import pytest

from bridgetower.serve.access import video_token
from served import BEARER, KEY, error_of

PATH, BODY = "/v1/embeddings", {"input": "a bar"}
# which a browser would send by itself
PASSWORD = "Basic " + base64.b64encode(f"me:{KEY}".encode()).decode()
LINK = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


@pytest.fixture
def locked(locked):
    return locked.client


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "Bearer",
        "Bearer sesame",
        f"Bearer {KEY}!",
        KEY,
        "Bearer schlüssel".encode("latin-1"),
        PASSWORD,
    ],
)
def test_wrong_keys(locked, given):
    headers = {} if given is None else {b"Authorization": given}
    for path in ("/v1/models", "/v1/other", "/other", PATH):
        response = locked.request("POST" if path == PATH else "GET", path, headers=headers)
        error = error_of(response, 401)
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"


def test_the_right_key_is_compared_in_constant_time(locked, monkeypatch):
    for given in (f"Bearer {KEY}", f"bearer  {KEY}"):
        assert locked.post(PATH, json=BODY, headers={"Authorization": given}).status_code == 200
        assert locked.get("/metrics", headers={"Authorization": given}).status_code == 200
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(
        hmac,
        "compare_digest",
        lambda one, other: compared.append((one, other)) or compare(one, other),
    )
    for key in ("s", KEY[:-1], KEY + "!", KEY * 100, KEY):
        locked.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert {len(part) for pair in compared for part in pair} == {32}
    assert [one == other for one, other in compared] == [False] * 4 + [True]


def test_other_sites_by_their_name(locked, client):
    place = client.base_url.netloc.decode()
    for origin in (
        "https://evil.example",
        "null",
        "http://localhost:1",
        f"http://{place}.evil.example",
    ):
        error = error_of(client.post(PATH, json=BODY, headers={"Origin": origin}), 403)
        assert error["code"] == "other_site"
        error_of(locked.get("/metrics", headers={"Origin": origin}), 403)
        headers = BEARER | {"Origin": origin}  # which no browser adds by itself
        assert locked.post(PATH, json=BODY, headers=headers).status_code == 200
    for headers in (
        {"Origin": f"http://{place}"},
        *({"Sec-Fetch-Site": site} for site in ("same-origin", "none")),
    ):
        assert client.post(PATH, json=BODY, headers=headers).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_sites_without_their_name(locked, client, site):
    """As an image, a frame or a script of theirs sends; only a link to the page is let in."""
    said = {"Sec-Fetch-Site": site}
    image, frame = {"Sec-Fetch-Mode": "no-cors"}, LINK | {"Sec-Fetch-Dest": "iframe"}
    for path in ("/", "/v1/models", "/metrics", "/openapi.json", "/health", "/ready", "/other"):
        for more in (
            {},
            image,
            frame,
            {"Sec-Fetch-Mode": "navigate"},
            *([LINK] if path != "/" else []),
        ):
            for server in (client, locked):
                assert error_of(server.get(path, headers=said | more), 403)["code"] == "other_site"
    error_of(client.post(PATH, json=BODY, headers=said), 403)
    error_of(client.post("/", headers=said | LINK), 403)
    error_of(client.get("/", headers=said | LINK | {"Origin": "null"}), 403)
    assert locked.get("/v1/models", headers=said | BEARER).status_code == 200
    for server in (client, locked):  # let in: the page needs no key
        assert server.get("/?a=b", headers=LINK | said).status_code == 200


def test_probes_refuse_bodies_and_names_like_theirs(locked):
    for headers in ({}, BEARER, BEARER | {"Host": "]"}):
        response = locked.post("/health", content=b"a" * 100_000, headers=headers)
        assert error_of(response, 405)["message"] == "POST /health: expected GET or HEAD"
        assert response.headers["allow"] == "GET, HEAD"
    for path in ("/health//", "/health/", "/health/../v1/models", "/HEALTH"):
        error_of(locked.get(path), 401)


def test_odd_queries_are_no_error(locked):
    for query in ("x=%C3%A9", "token=%FF", "%FF"):
        assert locked.get(f"/health?{query}").status_code == 200


def test_without_a_key_the_description_tells_of_none(client):
    assert "securitySchemes" not in client.get("/openapi.json").json()["components"]


def test_without_a_key_only_names_of_this_machine_are_answered(client, locked):
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]", "[::1]:8000"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200
    others = [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "[::2]",
        "[::1",
    ]
    others += ["[::1].evil.example", "[::1]evil", "localhost:evil", "127.0.0.1:80.evil", "]", "[x"]
    for host in others:
        assert (
            error_of(client.get("/v1/models", headers={"Host": host}), 403)["code"] == "wrong_host"
        )
        assert locked.get("/v1/models", headers=BEARER | {"Host": host}).status_code == 200


def test_a_token_opens_one_video_for_a_while(locked):
    video, other, now = "a" * 64, "b" * 64, int(time.time())
    token = video_token(KEY, video)
    error = error_of(locked.get(f"/v1/videos/{video}?token={token}"), 404)
    assert error["code"] == "no_video"  # of the index
    for path, given in (
        *((f"videos/{one}", token) for one in (other, video.upper())),
        *((f"{kind}/{video}", token) for kind in ("images", "models")),
        (f"videos/{video}", video_token(KEY, video, now - 1)),
        (f"videos/{video}", f"{now + 9999999}-{token.partition('-')[2]}"),
        (f"videos/{video}", video_token("other key", video)),
        *(
            (f"videos/{video}", odd)
            for odd in ("", "-", "a-b", f"{now + 9}-", "%00", "%FF", "%C3%A9", "\xff", "9" * 5000)
        ),
    ):
        assert (
            error_of(locked.get(f"/v1/{path}?token={given}"), 401)["code"] == "invalid_api_key"
        ), (path, given)
    assert 5 * 3600 < int(token.partition("-")[0]) - now < 7 * 3600
