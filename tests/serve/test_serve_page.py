"""The page's files: what a browser is told of them, and that nothing of the page is read from a request."""

import re

from bridgetower.serve import app
from helpers.servers import error_of

KINDS = {"css": "text/css", "js": "text/javascript", "/": "text/html", "docs": "text/html"}
POLICY = {
    **dict.fromkeys(["default-src", "base-uri", "form-action", "frame-ancestors"], "'none'"),
    **dict.fromkeys(["script-src", "style-src", "connect-src"], "'self'"),
    "img-src": "'self' data: blob:",
    "media-src": "'self' blob:",
}


def test_every_file_is_served_and_no_other(client):
    assert set(app.PAGE) == {"/", "/page.css", "/page.js", "/docs", "/docs.js", "/elements.js"}
    for path in app.PAGE:
        response = client.get(path)
        assert response.status_code == 200
        kind = next(kind for end, kind in KINDS.items() if path.endswith(end))
        assert response.headers["content-type"] == f"{kind}; charset=utf-8"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        rules = [
            rule.strip().partition(" ")
            for rule in response.headers["content-security-policy"].split(";")
        ]
        assert {name: value for name, _, value in rules} == POLICY
        assert not re.search(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[\w-]+\.", response.text)
        if "html" in kind:
            assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", response.text)
        if "javascript" in kind:
            unsafe = r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function"
            assert not re.search(unsafe, response.text)
    private_paths = (
        "/index.html",
        "/static/page.js",
        "/page.py",
        "/../pyproject.toml",
        "/favicon.ico",
        "/redoc",
    )
    for path in (*private_paths, "/%2e%2e/%2e%2e/etc/passwd", "/docs/oauth2-redirect"):
        error_of(client.get(path), 404)


def test_the_page_without_the_key_holds_nothing_and_may_be_left_out(locked, hasty):
    for path in app.PAGE:
        response = locked.client.get(path)
        assert response.status_code == 200
        assert '"tiny"' not in response.text
        # to which texts to embed are posted
        error_of(hasty.client.get(path), 405 if path == "/" else 404)
    for path in ("/v1/models", "/v1/index", f"/v1/images/{'0' * 64}"):
        error_of(locked.client.get(path), 401)
