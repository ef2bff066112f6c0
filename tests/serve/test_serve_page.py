"""The page's files: what a browser is told of them, and that nothing of the page is read from a request."""

import re

import httpx
import pytest

from bridgetower.serve import app
from served import Running, error_of

PLACES = {
    "/": "text/html; charset=utf-8",
    "/page.css": "text/css; charset=utf-8",
    "/page.js": "text/javascript; charset=utf-8",
    "/docs": "text/html; charset=utf-8",
    "/docs.js": "text/javascript; charset=utf-8",
    "/elements.js": "text/javascript; charset=utf-8",
}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data: blob:",
    "media-src": "'self' blob:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}


@pytest.mark.parametrize(("path", "kind"), PLACES.items())
def test_files_and_what_a_browser_is_told(client: httpx.Client, path: str, kind: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == kind
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    rules = [rule.strip().partition(" ") for rule in response.headers["content-security-policy"].split(";")]
    assert {name: value for name, _, value in rules} == POLICY


def test_every_file_is_served_and_no_other(client: httpx.Client) -> None:
    assert app.PAGE.keys() == PLACES.keys()
    for path in (
        "/index.html",
        "/static/page.js",
        "/page.py",
        "/../pyproject.toml",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/favicon.ico",
    ):
        error_of(client.get(path), 404)


def test_nothing_is_inline_or_from_elsewhere(client: httpx.Client) -> None:
    for path, kind in PLACES.items():
        text = client.get(path).text
        assert not re.search(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[\w-]+\.", text)
        if "html" in kind:
            assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", text)
        if "javascript" in kind:
            assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function", text)


def test_the_page_without_the_key_holds_nothing(locked: Running) -> None:
    for path in PLACES:
        response = locked.client.get(path)
        assert response.status_code == 200
        assert '"tiny"' not in response.text
    for path in ("/v1/models", "/v1/index", f"/v1/pictures/{'0' * 64}"):
        error_of(locked.client.get(path), 401)


def test_no_page(hasty: Running) -> None:
    for path in PLACES:
        error_of(hasty.client.get(path), 404)
