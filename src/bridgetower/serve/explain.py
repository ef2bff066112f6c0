"""`POST /v1/explain`: where each word of a text looks in an image."""

from __future__ import annotations

import base64
import io

from fastapi import APIRouter, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from bridgetower.serve.bodies import JsonRoute
from bridgetower.serve.schemas import COMPUTING, PICTURE, Body, Text, Truncate, Usage, long_json_of
from bridgetower.serve.service import Served

router = APIRouter(route_class=JsonRoute, tags=["pictures with texts"])

_DIGITS = 6  # of a share of attention, after the point
_QUALITY = 88  # of the JPEG of a view


class ExplainRequest(Body):
    """An image and a text about it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"image": PICTURE, "text": "a red square"}]})

    image: str = Field(description="Data URI of an image.")
    text: Text = Field(description="With at least one word.")
    view: bool = Field(False, description="Also return the part of the image that the model sees.")
    truncate: Truncate = False


class ExplainResponse(BaseModel):
    """The cross-attention of each word over the image, mean over the heads, layer by layer."""

    model: str = Field(description="That answered.")
    words: list[str] = Field(description="Of the text; a word of several tokens is their mean.")
    maps: list[list[list[list[float]]]] = Field(
        description="By layer, word, row and column of patches; each map sums to 1."
    )
    prefix_shares: list[list[float]] = Field(
        description="By layer and word: what went to the class token instead, before the maps were brought to 1."
    )
    probability: float | None = Field(None, description="That image and text match, if the model has a head for it.")
    view: str | None = Field(None, description="Data URI of the part of the image that the maps cover.")
    usage: Usage


@router.post("/v1/explain", response_model=ExplainResponse, responses=COMPUTING)
async def explain(body: ExplainRequest, service: Served) -> Response:
    """Say where each word of a text looks in an image, which is not what decides about a match."""
    with service.admission(1, "image", body.model):
        image, view = await service.inputs.seen(body.image, "image")
        (ids,) = await service.inputs.texts([body.text], "text", truncate=body.truncate)
        attention = await service.attention(image, ids)
        shown = await service.inputs.in_thread(lambda: _data_uri(view)) if body.view else None

        def answer() -> ExplainResponse:
            return ExplainResponse(
                model=service.name,
                words=list(attention.words),
                maps=attention.maps.double().round(decimals=_DIGITS).tolist(),
                prefix_shares=attention.prefix_shares.tolist(),
                probability=attention.probability,
                view=shown,
                usage=Usage.of(service.tokens([image], [ids])),
            )

        return await long_json_of(answer, attention.maps.numel())


def _data_uri(view: Image.Image) -> str:
    stream = io.BytesIO()
    view.save(stream, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
