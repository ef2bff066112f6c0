"""The web application: routes and what every request passes on its way to them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

import bridgetower
from bridgetower.engines.packages import is_installed
from bridgetower.serve import embeddings, models, pairs, rerank
from bridgetower.serve.access import API, OPEN, Access
from bridgetower.serve.errors import ApiError, add_handlers
from bridgetower.serve.limits import Limits
from bridgetower.serve.metrics import Counting
from bridgetower.serve.service import Service

logger = logging.getLogger(__name__)

_MIB = 2**20


def build_app(service: Service) -> FastAPI:
    """Returns the application around a service; the service runs while the application does."""
    page = _page(service)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running(), page.router.lifespan_context(page) if page else nullcontext():
            yield

    app = FastAPI(
        title="BridgeTower",
        version=bridgetower.__version__,
        description=f"Embeddings of texts and pictures, and what a model says about both together: {service.name}.",
        lifespan=lifespan,
        docs_url=None,  # the page loads scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    for routes in (embeddings, rerank, pairs, models):
        app.include_router(routes.router)
    app.include_router(_search(service))
    add_handlers(app)
    if page:
        app.router.default = _either(page, app.router.default)
    config = service.config
    app.add_middleware(Limits, max_body=config.max_body * _MIB, timeout=config.timeout)
    app.add_middleware(Access, api_key=config.api_key, host=config.host)
    app.add_middleware(Counting, metrics=service.metrics)
    _describe_errors(app, with_key=config.api_key is not None)
    return app


def _page(service: Service) -> FastAPI | None:
    """Returns the page for people, if it is wanted and can be had."""
    if not service.config.page:
        return None
    if not is_installed("gradio"):
        logger.info("no page at /: it needs pip install 'bridgetower[page]'")
        return None
    from bridgetower.serve.page.mount import page_app  # takes seconds, and another extra

    return page_app(service)


def _either(page: ASGIApp, not_found: ASGIApp) -> ASGIApp:
    """Returns what answers where the API has no route: the page, but not under the API's own prefix."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await (not_found if scope["path"].startswith(API) else page)(scope, receive, send)

    return answer


def _search(service: Service) -> APIRouter:
    """Returns the route of searches, or one that says that there is nothing to search."""
    if service.searcher is not None:
        from bridgetower.serve import search  # takes a second, and another extra

        return search.router
    router = APIRouter()

    @router.post("/v1/search", include_in_schema=False)
    async def no_index() -> None:
        raise ApiError(404, "this server has no index; start it with --index", code="no_index")

    return router


def _describe_errors(app: FastAPI, *, with_key: bool) -> None:
    """Puts the errors of this API into its description, in place of FastAPI's own, and that it takes a key."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            content = describe()
            for path, operations in content["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    if with_key and path not in OPEN:
                        operation["security"] = [{"key": []}]
            content["components"]["schemas"] = {
                name: schema
                for name, schema in content["components"]["schemas"].items()
                if name not in ("HTTPValidationError", "ValidationError")
            }
            if with_key:
                content["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
