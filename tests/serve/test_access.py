"""The API key, and the names that a server without one answers to."""

import base64
import hmac
import time
from collections.abc import Iterator

import httpx
import pytest

from bridgetower.predictor import Predictor
from bridgetower.serve.access import video_token
from served import error_of, running

KEY = "sesame open"
BODY = {"input": "a bar"}


def basic(password: str, name: str = "") -> str:
    """What a browser sends of a name and a password."""
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


@pytest.fixture(scope="module")
def locked(predictor: Predictor) -> Iterator[httpx.Client]:
    with running(predictor, api_key=KEY) as client:
        yield client


WRONG = [
    None,
    "",
    "Bearer",
    "Bearer sesame",
    f"Bearer {KEY}!",
    KEY,
    basic("sesame"),
    "Basic",
    f"Basic {KEY}",
    "Basic /w==",
]


@pytest.mark.parametrize("given", [*WRONG, basic(KEY)])
def test_wrong_keys(locked: httpx.Client, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    for method, path in (("POST", "/v1/embeddings"), ("GET", "/v1/models"), ("GET", "/v1/other")):
        response = locked.request(method, path, headers=headers, json=BODY if method == "POST" else None)
        error = error_of(response, 401)
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("given", WRONG)
def test_a_browser_is_asked_for_a_password(locked: httpx.Client, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    for path in ("/openapi.json", "/metrics", "/other"):
        response = locked.get(path, headers=headers)
        assert error_of(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"].startswith("Basic realm=")


def test_keys_are_compared_in_constant_time(locked: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda one, other: compared.append((one, other)) or compare(one, other))
    keys = ["s", KEY[:-1], KEY + "!", KEY * 100, KEY]
    for key in keys:
        locked.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert len(compared) == len(keys)
    assert {len(part) for pair in compared for part in pair} == {32}
    assert [one == other for one, other in compared] == [False] * 4 + [True]


def test_the_key_as_a_password(locked: httpx.Client) -> None:
    for given in (basic(KEY), basic(KEY, "me").replace("Basic", "basic")):
        assert locked.get("/metrics", headers={"Authorization": given}).status_code == 200


def test_what_other_sites_make_a_browser_send(locked: httpx.Client, client: httpx.Client) -> None:
    place = client.base_url.netloc.decode()
    for origin in ("https://evil.example", "null", "http://localhost:1", f"http://{place}.evil.example"):
        error = error_of(client.post("/v1/embeddings", json=BODY, headers={"Origin": origin}), 403)
        assert error["code"] == "other_site"
        error_of(locked.get("/metrics", headers={"Origin": origin, "Authorization": basic(KEY)}), 403)
        headers = {"Origin": origin, "Authorization": f"Bearer {KEY}"}  # no browser adds this by itself
        assert locked.post("/v1/embeddings", json=BODY, headers=headers).status_code == 200
    assert client.post("/v1/embeddings", json=BODY, headers={"Origin": f"http://{place}"}).status_code == 200


OF_OTHER_SITES = ("cross-site", "same-site")
LINK = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


@pytest.mark.parametrize("site", OF_OTHER_SITES)
def test_what_other_sites_make_a_browser_send_without_saying_their_name(
    locked: httpx.Client, client: httpx.Client, site: str
) -> None:
    """As an image, a frame or a script of theirs does, and a link to anything but the page."""
    said = {"Sec-Fetch-Site": site}
    image, frame = {"Sec-Fetch-Mode": "no-cors"}, LINK | {"Sec-Fetch-Dest": "iframe"}
    for path in ("/", "/v1/models", "/metrics", "/openapi.json", "/health", "/ready", "/other"):
        for more in ({}, image, frame, {"Sec-Fetch-Mode": "navigate"}, *([LINK] if path != "/" else [])):
            assert error_of(client.get(path, headers=said | more), 403)["code"] == "other_site"
            error_of(locked.get(path, headers={"Authorization": basic(KEY)} | said | more), 403)
    error_of(client.post("/v1/embeddings", json=BODY, headers=said), 403)
    error_of(client.post("/", headers=said | LINK), 403)
    error_of(client.get("/", headers=said | LINK | {"Origin": "null"}), 403)
    headers = said | {"Authorization": f"Bearer {KEY}"}  # no browser adds this by itself
    assert locked.get("/v1/models", headers=headers).status_code == 200


def test_a_link_of_another_site_to_the_page(client: httpx.Client, locked: httpx.Client) -> None:
    for site in OF_OTHER_SITES:
        headers = LINK | {"Sec-Fetch-Site": site}
        assert error_of(client.get("/?a=b", headers=headers), 404)["code"] == "not_found"  # let in: no page is here
        error_of(locked.get("/", headers=headers), 404)  # the page itself needs no key; here it is left out
    for site in ("same-origin", "none"):
        assert client.post("/v1/embeddings", json=BODY, headers={"Sec-Fetch-Site": site}).status_code == 200


def test_the_right_key(locked: httpx.Client) -> None:
    for given in (f"Bearer {KEY}", f"bearer  {KEY}"):
        assert locked.post("/v1/embeddings", json=BODY, headers={"Authorization": given}).status_code == 200


def test_a_key_in_another_encoding(locked: httpx.Client) -> None:
    error_of(locked.get("/v1/models", headers={"Authorization": "Bearer schlüssel".encode("latin-1")}), 401)


@pytest.mark.parametrize("host", ["]", "[x"])
def test_a_host_that_is_none(locked: httpx.Client, host: str) -> None:
    headers = {"Host": host, "Authorization": f"Bearer {KEY}"}
    error_of(locked.put("/health", headers=headers), 405)
    assert error_of(locked.get("/v1/other", headers=headers), 404)["message"] == "GET /v1/other: Not Found"


def test_probes_need_no_key(locked: httpx.Client) -> None:
    assert {locked.get(path).status_code for path in ("/health", "/ready")} == {200}
    assert {locked.head(path).status_code for path in ("/health", "/ready")} == {200}
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
        for headers in ({}, {"Authorization": f"Bearer {KEY}"}):
            response = locked.request(method, "/health", content=b"a" * 100_000, headers=headers)
            assert error_of(response, 405)["message"] == f"{method} /health: expected GET or HEAD"
            assert response.headers["allow"] == "GET, HEAD"
    for path in ("/health//", "/health/", "/health/../v1/models", "/HEALTH"):
        error_of(locked.get(path), 401)


def test_the_description_tells_of_the_key(locked: httpx.Client, client: httpx.Client) -> None:
    description = locked.get("/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert description["paths"]["/v1/embeddings"]["post"]["security"] == [{"key": []}]
    assert "security" not in description["paths"]["/health"]["get"]
    assert "securitySchemes" not in client.get("/openapi.json").json()["components"]


def test_without_a_key_other_names_are_refused(client: httpx.Client, locked: httpx.Client) -> None:
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "[::2]"):
        assert error_of(client.get("/v1/models", headers={"Host": host}), 403)["code"] == "wrong_host"
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8000"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200
    headers = {"Host": "photos.example", "Authorization": f"Bearer {KEY}"}
    assert locked.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["[::1].evil.example", "[::1", "[::1]evil", "localhost.evil.example", "localhost:evil", "127.0.0.1:80.evil"],
)
def test_names_that_begin_like_this_machine(client: httpx.Client, host: str) -> None:
    assert error_of(client.get("/v1/models", headers={"Host": host}), 403)["code"] == "wrong_host"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]", "[::1]:8000"])
def test_names_of_this_machine(client: httpx.Client, host: str) -> None:
    assert client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_a_token_opens_one_video_for_a_while(locked: httpx.Client) -> None:
    video, other, now = "a" * 64, "b" * 64, int(time.time())
    token = video_token(KEY, video)
    opened = [
        (404, f"/v1/videos/{video}?token={token}"),  # there is no index
        *((401, f"/v1/videos/{one}?token={token}") for one in (other, video.upper())),
        *((401, f"/v1/{kind}/{video}?token={token}") for kind in ("pictures", "models")),
        (401, f"/v1/videos/{video}"),
        (401, f"/v1/videos/{video}?token={video_token(KEY, video, now - 1)}"),
        (401, f"/v1/videos/{video}?token={now + 9999999}-{token.partition('-')[2]}"),
        (401, f"/v1/videos/{video}?token={video_token('other key', video)}"),
        *((401, f"/v1/videos/{video}?token={odd}") for odd in ("", "-", "a-b", f"{now + 9}-", "%00", "9" * 5000)),
    ]
    for status, path in opened:
        assert error_of(locked.get(path), status)["code"] == ("no_index" if status == 404 else "invalid_api_key"), path
    assert 5 * 3600 < int(token.partition("-")[0]) - now < 7 * 3600
