"""What the server has and how it is: `GET /v1/models`, `/health`, `/ready` and `/metrics`."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from starlette.responses import PlainTextResponse

from bridgetower.serve.errors import ApiError
from bridgetower.serve.schemas import errors, json_of
from bridgetower.serve.served_model import ServedModel, Use
from bridgetower.serve.service import Served, Service

router = APIRouter(tags=["server"])


class Model(BaseModel):
    """A model, with more about it than OpenAI's API tells."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When the server started, in seconds since 1970.")
    owned_by: Literal["bridgetower"] = "bridgetower"
    fingerprint: str = Field(description="Names what the vectors depend on.")
    image_size: int = Field(description="Side that pictures are brought to, in pixels.")
    max_tokens: int = Field(description="Longest text.")
    mask_token: str = Field(description="Stands in a text where a word is missing.")
    uses: list[Use] = Field(description="What it is asked for.")


class Models(BaseModel):
    """The model, and perhaps a second one that answers questions."""

    object: Literal["list"] = "list"
    data: list[Model]


class Status(BaseModel):
    """How the server is."""

    status: Literal["ok"] = "ok"


@router.get("/v1/models", response_model=Models, responses=errors(401))
async def models(service: Served) -> Response:
    """List what is served: one model, or two if questions have one of their own."""
    return json_of(Models(data=[_described(service, model) for model in service.models]))


@router.get("/v1/models/{name:path}", response_model=Model, responses=errors(401, 404))
async def model(name: str, service: Served) -> Response:
    """Describe a model."""
    for served in service.models:
        if served.name == name:
            return json_of(_described(service, served))
    has = " and ".join(repr(served.name) for served in service.models)
    raise ApiError(404, f"model is {name!r}; this server has {has}", code="model_not_found")


@router.head("/health", include_in_schema=False)
@router.get("/health", response_model=Status)
async def health() -> Response:
    """Whether the process answers."""
    return json_of(Status())


@router.head("/ready", include_in_schema=False)
@router.get("/ready", response_model=Status, responses=errors(503))
async def ready(service: Served) -> Response:
    """Whether it answers for the model: not before its first computation, and not while it shuts down."""
    if not service.ready:
        raise ApiError(
            503, "the model is not ready; try again in a second", code="not_ready", headers={"Retry-After": "1"}
        )
    return json_of(Status())


@router.get("/metrics", response_class=PlainTextResponse, responses=errors(401))
async def metrics(service: Served) -> Response:
    """Return figures for Prometheus."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _described(service: Service, model: ServedModel) -> Model:
    config = model.predictor.processor.config
    return Model(
        id=model.name,
        created=service.started,
        fingerprint=model.predictor.fingerprint,
        image_size=config.image_size,
        max_tokens=config.max_length,
        mask_token=model.predictor.processor.mask_token,
        uses=service.uses(model),
    )
