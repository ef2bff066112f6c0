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
# The User-Agent of a client that takes no object as an error begins so.
_MESSAGE_ALONE = b"Prediction Guard"
# Characters of a name or a message that a client gets back.
_MAX_NAME = 100
_MAX_MESSAGE = 500


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
        self.status = status
        self.param = param
        self.headers = dict(headers or {})
        self.message = shortened(message)
        self.code = code or _CODES.get(status, "error")

    def response(self, scope: Mapping[str, Any]) -> Response:
        """Returns the error as a response."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        details = {
            "message": self.message,
            "type": _TYPES.get(self.status, default),
            "param": self.param,
            "code": self.code,
        }
        agent = dict(scope["headers"]).get(b"user-agent", b"")
        error = self.message if agent.startswith(_MESSAGE_ALONE) else details
        # Escapes all but ASCII, as half a surrogate pair in a message has no UTF-8.
        return Response(json.dumps({"error": error}), self.status, self.headers, "application/json")


def failed(scope: Mapping[str, Any], error: Exception) -> ApiError:
    """Returns the error for a failure of the server, and logs its reason."""
    route = f"{scope['method']} {quote(scope['path'])}"
    request_id = scope.get("state", {}).get("request_id")
    logger.error("%s failed, request %s", route, request_id, exc_info=error)
    return ApiError(500, "the server failed; its log has the reason", code="internal_error")


async def handle(request: Request, error: Exception) -> Response:
    """Responds to any exception with an error of this API."""
    if isinstance(error, HTTPException):
        message = f"{request.method} {quote(request.scope['path'])}: {error.detail}"
        error = ApiError(error.status_code, message, headers=error.headers)
    elif isinstance(error, RequestValidationError):
        # Without "body" or "query".
        problems = [{**problem, "loc": problem["loc"][1:]} for problem in error.errors()]
        error = invalid_request(problems)
        kind = request.headers.get("content-type", "")
        # FastAPI has not read a body of another type.
        if request.method == "POST" and not problems[0]["loc"] and "json" not in kind:
            message = "the body is not sent as JSON; send it with the header Content-Type: application/json"
            error = ApiError(400, message)
    elif not isinstance(error, ApiError):
        error = failed(request.scope, error)
    return error.response(request.scope)


def invalid_request(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """Returns the first of pydantic's errors about a request, with its field."""
    problem = problems[0]
    if problem["type"] == "json_invalid":
        return ApiError(
            400, f"the body is not valid JSON: {problem['ctx']['error']}", code="invalid_json"
        )
    names = [str(name) for name in problem["loc"] if name != "body"]
    plain = [name for name in names if name.isidentifier() or name.isdigit()]
    param = ".".join(name for name in plain if len(name) <= _MAX_NAME) or None
    message = str(problem["msg"]).removeprefix("Value error, ")[:_MAX_MESSAGE]
    has_too_many = problem["type"] == "too_long" and problem["ctx"]["max_length"] == MOST_ITEMS
    status = 413 if has_too_many else 400
    return ApiError(status, f"{param or 'the body'}: {message}", param=param)
