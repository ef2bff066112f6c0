"""Every route by every method, key and sending site: a new route needs a row here."""

import re

import pytest

from bridgetower.serve.app import build_app
from helpers.servers import BEARER

# What is answered with the right key, POST with an empty object. HEAD is as GET; every other method is refused by 405.
PROBES = {path: {"GET": 200} for path in ("/health", "/ready", "/v1/health_check")}
FILES = ("/docs", "/page.css", "/page.js", "/docs.js", "/elements.js")
PAGES = {path: {"GET": 200} for path in FILES} | {"/": {"GET": 200, "POST": 400}}
COMPUTING = (
    *(
        "/v1/embeddings",
        "/v1/match",
        "/v1/answer",
        "/v1/fill-mask",
        "/v1/entail",
        "/v1/reason",
        "/v1/classify",
        "/v1/predict",
    ),
    *("/v1/explain", "/v1/rerank", "/v2/rerank", "/v1/search", "/v1/encode", "/v1/score"),
    *("/embed", "/similarity", "/rerank", "/score"),
)
OTHERS = {path: {"POST": 400} for path in COMPUTING} | {
    "/info": {"GET": 200},
    "/metrics": {"GET": 200},
    "/openapi.json": {"GET": 200},
    "/v1/index": {"GET": 200},
    "/v1/models": {"GET": 200},
    "/v1/models/{name:path}": {"GET": 404},
    "/v1/images/{id}": {"GET": 404},
    "/v1/videos/{id}": {"GET": 404},
    "/v1/completions": {"GET": 200, "POST": 404},
    "/v1/chat/completions": {"POST": 404},
}
DOORS = PROBES | PAGES | OTHERS
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")
KEYS = {"no key": {}, "wrong key": {"Authorization": "Bearer sesame"}, "right key": BEARER}
SITES = ("own", "other", None)


def expected_status(path, method, key, site, *, has_key):
    """The status of a request to a server that has a key, or none."""
    rows = DOORS[path]
    answer = rows.get("GET" if method == "HEAD" else method, 405)
    is_reading = method in ("GET", "HEAD")
    if path in PROBES and not is_reading:
        return 405
    if has_key and key == "right key":
        return answer
    if site == "other":
        return 403
    if path in PROBES or (path in PAGES and is_reading) or not has_key:
        return answer
    return 401


def flat(routes):
    """Routes with those of included routers, which newer releases of FastAPI keep apart."""
    for route in routes:
        included = getattr(route, "original_router", None)
        yield from [route] if included is None else flat(included.routes)


def test_every_route_has_a_row(server):
    routes = {}
    for route in flat(build_app(server.service).routes):
        routes.setdefault(route.path, set()).update(route.methods)
    assert routes == {path: set(rows) for path, rows in DOORS.items()}


def test_the_description_asks_for_the_key_where_it_is_needed(locked):
    described = locked.client.get("/openapi.json", headers=BEARER).json()["paths"]
    rows = {re.sub(":[a-z]+", "", path): set(methods) for path, methods in DOORS.items()}
    for path, operations in described.items():
        assert {method.upper() for method in operations} == rows[path]
        for operation in operations.values():
            assert operation.get("security", []) == ([] if path in PROBES else [{"key": []}])


@pytest.mark.parametrize("has_key", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_doors(server, locked, method, has_key):
    client = (locked if has_key else server).client
    own_origin = str(client.base_url).rstrip("/")
    origins = {"own": {"Origin": own_origin}, "other": {"Origin": "https://evil.example"}, None: {}}
    wrong = {}
    for path in DOORS:
        address = re.sub("{.*}", "a" * 64, path)
        for key, authorization in KEYS.items():
            for site in SITES:
                headers = {"Content-Type": "application/json", **authorization, **origins[site]}
                content = None if method in ("GET", "HEAD") else b"{}"
                status = client.request(
                    method, address, content=content, headers=headers
                ).status_code
                if status != expected_status(path, method, key, site, has_key=has_key):
                    wrong[path, key, site] = status
    assert not wrong
