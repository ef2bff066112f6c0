"""The web application: routes and what every request passes on its way to them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI

import bridgetower
from bridgetower.serve import embeddings, explain, models, page, pairs, rerank, statements
from bridgetower.serve.access import OPEN, Access
from bridgetower.serve.errors import ApiError, add_handlers
from bridgetower.serve.limits import Limits
from bridgetower.serve.metrics import Counting
from bridgetower.serve.service import Service

_MIB = 2**20


def build_app(service: Service) -> FastAPI:
    """Returns the application around a service; the service runs while the application does."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="BridgeTower",
        version=bridgetower.__version__,
        description=f"Embeddings of texts and pictures, and what a model says about both together: {service.name}.",
        lifespan=lifespan,
        docs_url=None,  # it loads scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    for routes in (embeddings, rerank, pairs, statements, explain, models):
        app.include_router(routes.router)
    for router in _search(service):
        app.include_router(router)
    if service.config.page:
        app.include_router(page.routes())
    add_handlers(app)
    config = service.config
    app.add_middleware(Limits, max_body=config.max_body * _MIB, timeout=config.timeout)
    app.add_middleware(Access, api_key=config.api_key, host=config.host)
    app.add_middleware(Counting, metrics=service.metrics)
    _describe_errors(app, with_key=config.api_key is not None)
    return app


def _search(service: Service) -> list[APIRouter]:
    """Returns the routes of what is found in an index, or some that say that there is none."""
    if service.searcher is not None:
        from bridgetower.serve import pictures, search  # take a second, and another extra

        return [search.router, pictures.router]
    router = APIRouter(include_in_schema=False)

    async def no_index() -> None:
        raise ApiError(404, "this server has no index; start it with --index", code="no_index")

    for method, path in (("POST", "/v1/search"), ("GET", "/v1/index"), ("GET", "/v1/pictures/{id}")):
        router.add_api_route(path, no_index, methods=[method])
    return [router]


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
