"""Errors as OpenAI's API reports them: one JSON object, never a trace."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from bridgetower.files import shortened
from bridgetower.serve.config import MOST_ITEMS

logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    429: "queue_full",
    503: "timeout",
}
# begins the User-Agent of a client that takes no object as an error
_MESSAGE_ALONE = b"Prediction Guard"
_SHOWN, _SHOWN_MESSAGE = 100, 500  # characters of what a client sent that it gets back


class ApiError(Exception):
    """An error in the response to a client, in one line."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.headers = status, param, dict(headers or {})
        self.message = shortened(message)
        self.code = code or _CODES.get(status, "error")

    def response(self, scope: Mapping[str, Any]) -> Response:
        """Returns it as a response; half a surrogate pair in a message is escaped."""
        kind = _TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        content = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        agents = [value for name, value in scope["headers"] if name == b"user-agent"]
        error = self.message if agents and agents[0].startswith(_MESSAGE_ALONE) else content
        return Response(json.dumps({"error": error}), self.status, self.headers, "application/json")


def failed(scope: Mapping[str, Any], error: Exception) -> ApiError:
    """Returns the error for a failure of the server; its reason is only logged."""
    place = f"{scope['method']} {quote(scope['path'])}"
    logger.error(
        "%s failed, request %s", place, scope.get("state", {}).get("request_id"), exc_info=error
    )
    return ApiError(500, "the server failed; its log has the reason", code="internal_error")


async def handle(request: Request, error: Exception) -> Response:
    """Answers with an error of this API, whatever was raised."""
    if isinstance(error, HTTPException):
        message = f"{request.method} {quote(request.scope['path'])}: {error.detail}"
        error = ApiError(error.status_code, message, headers=error.headers)
    elif isinstance(error, RequestValidationError):
        # without "body" or "query"
        problems = [{**problem, "loc": problem["loc"][1:]} for problem in error.errors()]
        error, kind = invalid_request(problems), request.headers.get("content-type", "")
        # FastAPI has not read it then
        if request.method == "POST" and not problems[0]["loc"] and "json" not in kind:
            message = "the body is not sent as JSON; send it with the header Content-Type: application/json"
            error = ApiError(400, message)
    elif not isinstance(error, ApiError):
        error = failed(request.scope, error)
    return error.response(request.scope)


def invalid_request(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """Returns the first of pydantic's errors about a request, with its field."""
    problem = problems[0]
    place = [str(part) for part in problem["loc"] if part != "body"]
    if problem["type"] == "json_invalid":
        return ApiError(
            400, f"the body is not valid JSON: {problem['ctx']['error']}", code="invalid_json"
        )
    known = [
        part for part in place if len(part) <= _SHOWN and (part.isidentifier() or part.isdigit())
    ]
    param = ".".join(known) or None
    message = str(problem["msg"]).removeprefix("Value error, ")[:_SHOWN_MESSAGE]
    large = problem["type"] == "too_long" and problem["ctx"]["max_length"] == MOST_ITEMS
    return ApiError(413 if large else 400, f"{param or 'the body'}: {message}", param=param)
