"""Prefixes, forwarded headers and other sites, as a proxy or a browser sends them."""

import pytest

from helpers.servers import error_of, running_client

SITE = "https://app.example.org"
BODY = {"input": "a bar"}


@pytest.fixture(scope="module")
def trusting(predictor):
    settings = {
        "forwarded_allow_ips": ("127.0.0.0/8",),
        "root_path": "/photos",
        "server_name": ("Photos.example",),
    }
    with running_client(predictor, page=True, cors_origin=(SITE,), **settings) as client:
        yield client


def test_a_prefix_that_the_proxy_leaves_or_takes_off(trusting, client):
    for path in (
        "/photos/v1/models",
        "/v1/models",
        "/photos/",
        "/",
        "/photos/page.css",
        "/photos/health",
    ):
        assert trusting.get(path).status_code == 200
    for path in (
        "/photosv1/models",
        "/photos/photos/v1/models",
        "/photos/v1/models/",
        "/photo/v1/models",
    ):
        error_of(trusting.get(path), 404)
    answer = trusting.get("/photos")
    assert (answer.status_code, answer.headers["location"]) == (307, "/photos/")
    assert trusting.get("/openapi.json").json()["servers"] == [{"url": "/photos"}]
    error_of(client.get("/v1/models/"), 404)
    assert "servers" not in client.get("/openapi.json").json()


def test_names(trusting, client):
    for host in ("photos.example", "PHOTOS.example:443"):
        assert trusting.get("/v1/models", headers={"Host": host}).status_code == 200
        error = error_of(client.get("/v1/models", headers={"Host": host}), 403)
        assert "give its other names with --server-name" in error["message"]
    # as a page of evil.example could send
    headers = {
        "Host": "evil.example",
        "X-Forwarded-Host": "photos.example",
    }
    assert error_of(trusting.get("/v1/models", headers=headers), 403)["code"] == "wrong_host"


def test_the_forwarded_host_counts_only_from_trusted_proxies(trusting, client):
    headers = {"Origin": "https://photos.example:8443", "X-Forwarded-Host": "photos.example:8443"}
    assert trusting.post("/v1/embeddings", json=BODY, headers=headers).status_code == 200
    error = error_of(client.post("/v1/embeddings", json=BODY, headers=headers), 403)
    assert (
        "let a proxy in front of the server pass the header Host with its port" in error["message"]
    )
    headers["X-Forwarded-Host"] = "photos.example"
    error_of(trusting.post("/v1/embeddings", json=BODY, headers=headers), 403)


def test_what_the_browser_compared_itself(client):
    """A proxy that drops the port from Host does not make a page one of another site."""
    headers = {"Origin": "http://localhost:8080", "Host": "localhost"}
    error_of(client.post("/v1/embeddings", json=BODY, headers=headers), 403)
    headers["Sec-Fetch-Site"] = "same-origin"
    assert client.post("/v1/embeddings", json=BODY, headers=headers).status_code == 200
    for site in ("same-site", "cross-site", ""):
        error_of(
            client.post("/v1/embeddings", json=BODY, headers=headers | {"Sec-Fetch-Site": site}),
            403,
        )


PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def test_a_site_that_is_allowed(trusting):
    headers = {"Origin": SITE, "Sec-Fetch-Site": "cross-site"}
    for content, status in ((BODY, 200), ({"input": 7}, 400)):
        answer = trusting.post("/v1/embeddings", json=content, headers=headers)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, SITE)
    answer = trusting.options("/v1/embeddings", headers=headers | PREFLIGHT)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, SITE)
    # no browser then shows what its password gets
    assert "access-control-allow-credentials" not in answer.headers


def test_a_site_that_is_not(trusting, client):
    for site in (
        "https://app.example.org:444",
        "http://app.example.org",
        "https://evil.example",
        "null",
    ):
        headers = {"Origin": site, "Sec-Fetch-Site": "cross-site"}
        answer = trusting.post("/v1/embeddings", json=BODY, headers=headers)
        preflight = trusting.options("/v1/embeddings", headers=headers | PREFLIGHT)
        assert (error_of(answer, 403)["code"], preflight.status_code) == ("other_site", 400)
        assert not any(
            "access-control-allow-origin" in response.headers for response in (answer, preflight)
        )
    error_of(client.options("/v1/embeddings", headers={"Origin": SITE} | PREFLIGHT), 403)
