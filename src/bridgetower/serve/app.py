"""The web application: its routes and middleware, routes about the server, and the page."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any, Literal

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

import bridgetower
from bridgetower.serve import adapters, embedding_routes, pair_routes
from bridgetower.serve.access import OPEN, AuthMiddleware, ProxyMiddleware
from bridgetower.serve.errors import ApiError, handle
from bridgetower.serve.metrics import ObservingMiddleware
from bridgetower.serve.middleware import RequestLimitsMiddleware, StrictHttpMiddleware
from bridgetower.serve.schemas import AsciiResponse, errors
from bridgetower.serve.service import HEADS, MIB, Served, Service, Use

router = APIRouter(tags=["server"])

# The file at each path of the pages, which use public routes alone.
PAGE = {"/": "index.html", "/docs": "docs.html"}
PAGE |= {f"/{name}": name for name in ("page.css", "page.js", "docs.js", "elements.js")}
_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}
_INDEX_ROUTES = {
    "/v1/search": "POST",
    "/v1/index": "GET",
    "/v1/images/{id}": "GET",
    "/v1/videos/{id}": "GET",
}
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def build_app(service: Service) -> FastAPI:
    config = service.config
    app = FastAPI(
        title="BridgeTower",
        version=bridgetower.__version__,
        description=f"Embeddings of texts and images, and predictions for both together: {service.main.name}.",
        openapi_url=None,  # FastAPI would write the description anew for each request
        docs_url=None,  # it loads scripts from elsewhere; /docs is a page of this package
        redoc_url=None,
        default_response_class=AsciiResponse,
        redirect_slashes=False,  # to an address in full, which a proxy may have another name for
        servers=[{"url": config.root_path}] if config.root_path else None,
        exception_handlers=dict.fromkeys(
            (ApiError, HTTPException, RequestValidationError, Exception), handle
        ),
    )
    app.state.service = service
    for routes in (embedding_routes, pair_routes, adapters):
        app.include_router(routes.router)
    if service.searcher is not None:
        from bridgetower.serve import search  # takes a second, and another extra

        app.include_router(search.router)
    else:

        async def no_index() -> None:
            raise ApiError(404, "this server has no index; start it with --index", code="no_index")

        for path, method in _INDEX_ROUTES.items():
            app.add_api_route(path, no_index, methods=[method], include_in_schema=False)
    app.include_router(router)

    for path, name in PAGE.items() if config.page else ():
        content = files("bridgetower.serve").joinpath("static", name).read_bytes()
        file = Response(content, media_type=_KINDS[name.partition(".")[2]], headers=_PAGE_HEADERS)
        app.add_api_route(
            path, lambda file=file: file, response_class=Response, include_in_schema=False
        )

    # The last middleware sees a request first.
    app.add_middleware(
        RequestLimitsMiddleware, max_body=config.max_body * MIB, timeout=config.timeout
    )
    app.add_middleware(AuthMiddleware, config=config, page=PAGE.keys())
    if config.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )
    app.add_middleware(StrictHttpMiddleware)
    app.add_middleware(ObservingMiddleware, metrics=service.metrics, access_log=config.access_log)
    app.add_middleware(ProxyMiddleware, trusted=config.forwarded_allow_ips, prefix=config.root_path)

    def description() -> Response:
        """Describe the routes, with this API's errors in place of FastAPI's own, and with the key that they need."""
        content = app.openapi()
        for path, operations in content["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if config.api_key is not None and path not in OPEN:
                    operation["security"] = [{"key": []}]
        for name in ("HTTPValidationError", "ValidationError"):
            content["components"]["schemas"].pop(name, None)
        if config.api_key is not None:
            content["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return AsciiResponse(content)

    app.add_api_route(
        "/openapi.json", cache(description), include_in_schema=False, response_model=None
    )
    return app


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When the server started, in seconds since 1970.")
    owned_by: Literal["bridgetower"] = "bridgetower"
    fingerprint: str = Field(description="Names what the vectors depend on.")
    image_size: int = Field(description="Side that images are brought to, in pixels.")
    max_tokens: int = Field(description="Longest text.")
    mask_token: str = Field(description="Stands in a text where a word is missing.")
    uses: list[Use] = Field(description="What it can be used for.")
    heads: list[str] = Field(description="The heads that `/v1/predict` serves.")


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


@router.get("/v1/models", responses=errors(401))
async def models(service: Served) -> Models:
    """List what is served: one model, or two if questions have one of their own."""
    data = [
        Model(
            id=served.name,
            created=service.started,
            fingerprint=served.predictor.fingerprint,
            image_size=processor.config.image_size,
            max_tokens=processor.config.max_length,
            mask_token=processor.mask_token,
            uses=[
                use
                for use, head in HEADS.items()
                if service.model_for(head) is served and served.lacking(head) is None
            ],
            heads=served.predicting,
        )
        for served in service.models
        for processor in [served.predictor.processor]
    ]
    return Models(data=data)


@router.get("/v1/completions", include_in_schema=False)
async def completions() -> Models:
    """List the models that complete texts: none. Prediction Guard's client checks an address and a key by this call."""
    return Models(data=[])


@router.post("/v1/chat/completions", include_in_schema=False)
@router.post("/v1/completions", include_in_schema=False)
async def chat() -> None:
    """Refuse to generate text, in words."""
    message = "this server generates no text; send the hits of /v1/search to a language model (docs/videos.md)"
    raise ApiError(404, message, code="not_a_language_model")


@router.get("/v1/models/{name:path}", responses=errors(401, 404))
async def model(name: str, service: Served) -> Model:
    """Describe a model."""
    served = {model.id: model for model in (await models(service)).data}
    if name in served:
        return served[name]
    names = " and ".join(map(repr, served))
    raise ApiError(404, f"model is {name!r}; this server has {names}", code="model_not_found")


@router.get("/health")
async def health() -> dict[str, str]:
    """Whether the process responds."""
    return {"status": "ok"}


@router.get("/ready", responses=errors(503))
async def ready(service: Served) -> dict[str, str]:
    """Whether the model responds: not before its first computation, and not while the server shuts down."""
    if not service.ready:
        message = "the model is not ready; try again in a second"
        raise ApiError(503, message, code="not_ready", headers={"Retry-After": "1"})
    return {"status": "ok"}


@router.get("/info", responses=errors(401))
async def info(service: Served) -> dict[str, Any]:
    """Describe the server as text-embeddings-inference does, with requests and batches counted in items."""
    config = service.config
    predictor = service.main.predictor
    max_length = predictor.processor.config.max_length
    return {
        "model_id": service.main.name,
        "model_sha": predictor.fingerprint,
        "model_dtype": _DTYPES[predictor.precision],
        "model_type": {"embedding": {"pooling": "cls"}},
        "max_concurrent_requests": config.queue,
        "max_input_length": max_length,
        "max_batch_tokens": service.max_batch * max_length,
        "max_batch_requests": service.max_batch,
        "max_client_batch_size": config.max_items,
        "auto_truncate": False,
        "tokenization_workers": 1,
        "version": bridgetower.__version__,
    }


@router.get("/metrics", response_class=PlainTextResponse, responses=errors(401))
async def metrics(service: Served) -> Response:
    """Return metrics for Prometheus."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
