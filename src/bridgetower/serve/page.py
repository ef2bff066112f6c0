"""The page for people: files of the package at `/`, which ask the routes as every program does."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Response

FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
"""What is at each path; it holds nothing of the server's, and needs no key."""

_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def routes() -> APIRouter:
    """Returns the routes of the page."""
    router = APIRouter(include_in_schema=False)
    for path, (name, kind) in FILES.items():
        content = files("bridgetower.serve").joinpath("static", name).read_bytes()
        file = Response(content, media_type=kind, headers=_HEADERS)
        router.add_api_route(path, lambda file=file: file, response_class=Response)
    return router
