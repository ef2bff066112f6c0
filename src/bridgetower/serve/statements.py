"""Classes of images and texts: `POST /v1/entail` about an image each, `/v1/reason` about two, `/v1/classify`."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from bridgetower.serve.bodies import JsonRoute
from bridgetower.serve.errors import ApiError
from bridgetower.serve.schemas import (
    COMPUTING,
    PICTURE,
    Body,
    Listed,
    Pictures,
    Texts,
    Top,
    Truncate,
    Usage,
    json_of,
    num_pairs,
    paired,
)
from bridgetower.serve.service import Served, Service

router = APIRouter(route_class=JsonRoute, tags=["pictures with texts"])

_ALL = 3  # judgements at most


class EntailRequest(Body):
    """Images and a statement about each."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"images": PICTURE, "statements": "it is red"}]})

    images: Pictures
    statements: Texts
    truncate: Truncate = False


class ReasonRequest(Body):
    """Left images, right images, and a statement about each two."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"images": PICTURE, "images_2": PICTURE, "statements": "both are red"}]}
    )

    images: Pictures
    images_2: Pictures
    statements: Texts
    truncate: Truncate = False


class ClassifyRequest(Body):
    """Images, texts, or images with texts."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"images": PICTURE, "texts": "a red square"}]})

    images: Pictures | None = None
    texts: Texts | None = None
    top: Top | None = Field(None, description="Classes per input; all if left out.")
    truncate: Truncate = False


class Judgement(BaseModel):
    """A judgement that the model can give."""

    label: str
    probability: float = Field(description="Over all of them, or of each on its own where several may hold.")


class Judged(BaseModel):
    """The judgements of a statement, likeliest first."""

    index: int
    judgements: list[Judgement]


class JudgedResponse(Listed[Judged]):
    """Judgements of every statement."""


class Classified(BaseModel):
    """The classes of an input, likeliest first."""

    index: int
    classes: list[Judgement]


class ClassifiedResponse(Listed[Classified]):
    """Classes of every input."""


@router.post("/v1/entail", response_model=JudgedResponse, responses=COMPUTING)
async def entail(body: EntailRequest, service: Served) -> Response:
    """Say whether images contradict, leave open or entail statements, with a model fine-tuned on SNLI-VE."""
    return await _judged("entail", body, service, [])


@router.post("/v1/reason", response_model=JudgedResponse, responses=COMPUTING)
async def reason(body: ReasonRequest, service: Served) -> Response:
    """Say whether statements about two images each are true, with a model fine-tuned on NLVR2."""
    if len(body.images) != len(body.images_2):
        message = f"{len(body.images)} images and {len(body.images_2)} images_2; expected a second one for each first"
        raise ApiError(400, message, param="images_2")
    return await _judged("reason", body, service, body.images_2)


@router.post("/v1/classify", response_model=ClassifiedResponse, responses=COMPUTING)
async def classify(body: ClassifyRequest, service: Served) -> Response:
    """Classify images, texts, or images with texts, with a model fine-tuned on a table of one's own."""
    if body.images is None and body.texts is None:
        raise ApiError(400, "neither images nor texts given; expected one of them at least", param="images")
    service.check_use("classify")
    model = service.model_for("classify")
    images: list[str | None] = [None] * len(body.texts or ()) if body.images is None else list(body.images)
    texts = [""] * len(images) if body.texts is None else body.texts
    if len(images) != len(texts):
        raise ApiError(400, f"{len(images)} images and {len(texts)} texts; expected as many of one as of the other")
    with service.admission(len(images), "texts" if body.images is None else "images", body.model, model):
        outcomes, tokens = await service.pairs(
            "classify",
            *(images, texts, [(number, number) for number in range(len(images))]),
            top=body.top or len(model.predictor.class_names("classification")),
            truncate=body.truncate,
        )
    data = [
        Classified(index=number, classes=[Judgement(**vars(choice)) for choice in choices])
        for number, choices in enumerate(outcomes)
    ]
    return json_of(ClassifiedResponse(data=data, model=model.name, usage=Usage.of(tokens)))


async def _judged(
    use: Literal["entail", "reason"], body: EntailRequest | ReasonRequest, service: Service, images_2: list[str]
) -> Response:
    service.check_use(use)
    count, model = num_pairs(body.images, body.statements) + len(images_2), service.model_for(use)
    with service.admission(count, "images", body.model, model):
        outcomes, tokens = await service.pairs(
            use,
            *(body.images, body.statements, paired(body.images, body.statements)),
            images_2=images_2,
            params=("images", "statements"),
            top=_ALL,
            truncate=body.truncate,
        )
    data = [
        Judged(index=number, judgements=[Judgement(**vars(choice)) for choice in choices])
        for number, choices in enumerate(outcomes)
    ]
    return json_of(JudgedResponse(data=data, model=model.name, usage=Usage.of(tokens)))
