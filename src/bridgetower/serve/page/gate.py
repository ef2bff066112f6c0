"""What of Gradio can be reached, and with what.

Gradio has many routes beside those that its own page needs, fetches files that a browser names by URL, and answers a
request that it does not understand with a failure.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bridgetower.serve.errors import ApiError

_JOIN, _RESULTS = "/gradio_api/queue/join", "/gradio_api/queue/data"
_PATHS = frozenset(
    {
        *("/", "/config", "/theme.css", "/favicon.ico"),
        *(_JOIN, _RESULTS, "/gradio_api/upload", "/gradio_api/upload_progress"),
    }
)
_PREFIXES = ("/assets/", "/static/", "/gradio_api/file=")
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
        "frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Gate:
    """Lets through what the page needs.

    The answers forbid the browser to load anything from elsewhere, and to show the page within another.
    """

    def __init__(self, app: ASGIApp, *, inputs: Mapping[int, int], sessions: Container[str]) -> None:
        """Wraps Gradio's application.

        Args:
            app: It.
            inputs: How many values each of its functions takes.
            sessions: Browsers for which it has results, or will have.
        """
        self._app, self._inputs, self._sessions = app, inputs, sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            if scope["path"] not in _PATHS and not scope["path"].startswith(_PREFIXES):
                raise ApiError(404, f"{scope['method']} {scope['path']}: Not Found")
            if scope["path"] == _RESULTS and not self._is_known(scope["query_string"]):
                raise ApiError(404, "there are no results for this session; press the button again")
            if scope["path"] == _JOIN:
                receive = _replayed(self._checked(await _body(receive)), receive)
                headers = MutableHeaders(scope=scope)
                headers["Content-Type"] = "application/json"
                del headers["Content-Length"]
        except ApiError as error:
            await error.response()(scope, receive, noted)
            return
        await self._app(scope, receive, noted)

    def _is_known(self, query: bytes) -> bool:
        """Whether a request for results is of a session that has any."""
        return parse_qs(query.decode("latin-1")).get("session_hash", [""])[0] in self._sessions

    def _checked(self, body: bytes) -> bytes:
        """Returns a press of a button, written anew so that what was checked is what is read."""
        try:
            given = json.loads(body)
            data, function, session = given["data"], given["fn_index"], given["session_hash"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ApiError(400, "this is no press of a button of the page") from None
        known = isinstance(function, int) and isinstance(session, str) and isinstance(data, list)
        if not known or len(data) != self._inputs.get(function, -1):
            raise ApiError(400, "the page has no such button, or it takes other values")
        if names_url(data):
            raise ApiError(400, "files are not fetched from URLs; upload them")
        return json.dumps({"data": data, "fn_index": function, "session_hash": session}).encode()


def names_url(value: Any) -> bool:
    """Whether any file within what a browser sent is given by a URL."""
    if isinstance(value, dict):
        return "://" in str(value.get("path", "")) or any(map(names_url, value.values()))
    return isinstance(value, list) and any(map(names_url, value))


async def _body(receive: Receive) -> bytes:
    """Reads a body, whose size was checked before."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Returns what hands over a body first, and then what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
