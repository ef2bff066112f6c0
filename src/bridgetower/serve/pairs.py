"""What a model computes of images with texts, in a route for each use."""

from __future__ import annotations

import base64
import io
from typing import Any

from fastapi import APIRouter, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from bridgetower.serve.errors import ApiError
from bridgetower.serve.schemas import (
    COMPUTING,
    IMAGE,
    Body,
    Images,
    JsonRoute,
    Listed,
    Text,
    Texts,
    Top,
    Usage,
    long_json_of,
)
from bridgetower.serve.service import PairInputs, PairUse, Served, Service

router = APIRouter(route_class=JsonRoute, tags=["images with texts"])

_ALL = 2**31  # classes: there are fewer
_DIGITS = 6  # of a share of attention, after the point
_QUALITY = 88  # of the JPEG of a view


class MatchRequest(Body):
    """Images and texts; the first image goes with the first text."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"images": IMAGE, "texts": ["a red square", "two dogs in the snow"], "all_pairs": True}]
        }
    )

    images: Images
    texts: Texts
    all_pairs: bool = Field(False, description="Match every image with every text.")


class Match(BaseModel):
    """An image and a text."""

    image: int = Field(description="Number of the image.")
    text: int = Field(description="Number of the text.")
    probability: float = Field(description="That they belong together.")


class MatchResponse(Listed[Match]):
    """A probability for every pair; with `all_pairs`, those of the first image come first."""


class AnswerRequest(Body):
    """Images and a question about each."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"images": IMAGE, "questions": "what colour is the square?", "top": 3}]}
    )

    images: Images
    questions: Texts
    top: Top = 5


class Choice(BaseModel):
    """A class that the model can choose."""

    label: str
    probability: float = Field(description="Over all of them, or of each on its own where several may hold.")


class Answers(BaseModel):
    """The answers to a question, likeliest first."""

    index: int
    answers: list[Choice] = Field(description="Whose probabilities do not sum to one.")


class AnswerResponse(Listed[Answers]):
    """Answers to every question."""


class FillMaskRequest(Body):
    """Images and a text about each, with masks where words are missing."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"images": IMAGE, "texts": "a <mask> square"}]})

    images: Images
    texts: Texts
    top: Top = 5


class Word(BaseModel):
    """A candidate for a masked word."""

    word: str
    probability: float


class Filled(BaseModel):
    """For each mask of a text, words, likeliest first."""

    index: int
    masks: list[list[Word]]


class FillMaskResponse(Listed[Filled]):
    """Words for the masks of every text."""


class EntailRequest(Body):
    """Images and a statement about each."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"images": IMAGE, "statements": "it is red"}]})

    images: Images
    statements: Texts


class ReasonRequest(Body):
    """Left images, right images, and a statement about each two."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"images": IMAGE, "images_2": IMAGE, "statements": "both are red"}]}
    )

    images: Images
    images_2: Images
    statements: Texts


class ClassifyRequest(Body):
    """Images, texts, or images with texts."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"images": IMAGE, "texts": "a red square"}]})

    images: Images | None = None
    texts: Texts | None = None
    top: Top | None = Field(None, description="Classes per input; all if left out.")


class Judged(BaseModel):
    """The judgements of a statement, likeliest first."""

    index: int
    judgements: list[Choice]


class JudgedResponse(Listed[Judged]):
    """Judgements of every statement."""


class Classified(BaseModel):
    """The classes of an input, likeliest first."""

    index: int
    classes: list[Choice]


class ClassifiedResponse(Listed[Classified]):
    """Classes of every input."""


class ExplainRequest(Body):
    """An image and a text about it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"image": IMAGE, "text": "a red square"}]})

    image: str = Field(description="Data URI of an image.")
    text: Text = Field(description="With at least one word.")
    view: bool = Field(False, description="Also return the part of the image that the model sees.")


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


@router.post("/v1/match", response_model=MatchResponse, responses=COMPUTING)
async def match(body: MatchRequest, service: Served) -> Response:
    """Say how well images and texts belong together."""
    given = PairInputs(images=body.images, texts=body.texts, all_pairs=body.all_pairs)
    return await _computed("match", body, given, service, MatchResponse, "probability")


@router.post("/v1/answer", response_model=AnswerResponse, responses=COMPUTING)
async def answer(body: AnswerRequest, service: Served) -> Response:
    """Answer questions about images, with a model that was fine-tuned on VQA."""
    given = PairInputs(images=body.images, texts=body.questions, params=("images", "questions"))
    return await _computed("answer", body, given, service, AnswerResponse, "answers", top=body.top)


@router.post("/v1/fill-mask", response_model=FillMaskResponse, responses=COMPUTING)
async def fill_mask(body: FillMaskRequest, service: Served) -> Response:
    """Fill masked words of texts about images."""
    given = PairInputs(images=body.images, texts=body.texts)
    return await _computed("fill-mask", body, given, service, FillMaskResponse, "masks", top=body.top)


@router.post("/v1/entail", response_model=JudgedResponse, responses=COMPUTING)
async def entail(body: EntailRequest, service: Served) -> Response:
    """Say whether images contradict, leave open or entail statements, with a model fine-tuned on SNLI-VE."""
    given = PairInputs(images=body.images, texts=body.statements, params=("images", "statements"))
    return await _computed("entail", body, given, service, JudgedResponse, "judgements", top=_ALL)


@router.post("/v1/reason", response_model=JudgedResponse, responses=COMPUTING)
async def reason(body: ReasonRequest, service: Served) -> Response:
    """Say whether statements about two images each are true, with a model fine-tuned on NLVR2."""
    first, second = body.images, body.images_2
    if len(first) != len(second):
        message = f"{len(first)} images and {len(second)} images_2; expected a second one for each first"
        raise ApiError(400, message, param="images_2")
    given = PairInputs(images=first, images_2=second, texts=body.statements, params=("images", "statements"))
    return await _computed("reason", body, given, service, JudgedResponse, "judgements", top=_ALL)


@router.post("/v1/classify", response_model=ClassifiedResponse, responses=COMPUTING)
async def classify(body: ClassifyRequest, service: Served) -> Response:
    """Classify images, texts, or images with texts, with a model fine-tuned on a table of one's own."""
    if body.images is None and body.texts is None:
        raise ApiError(400, "neither images nor texts given; expected one of them at least", param="images")
    given = PairInputs(
        images=body.images or [None] * len(body.texts or ()), texts=body.texts or [""] * len(body.images or ())
    )
    return await _computed("classify", body, given, service, ClassifiedResponse, "classes", top=body.top or _ALL)


async def _computed(
    use: PairUse,
    body: Body,
    given: PairInputs,
    service: Service,
    response: type[BaseModel],
    result: str,
    *,
    top: int = 1,
) -> Response:
    """Computes something of images with texts.

    Args:
        use: What is computed.
        body: The request.
        given: Its images and texts.
        service: Computes it.
        response: That is returned.
        result: Field of its entries for what was computed; they may also have `index`, `image` and `text`.
        top: Answers or classes, or words per mask.
    """
    image_param, text_param = given.params
    count, param = given.count() + len(given.images_2), text_param if given.images[0] is None else image_param
    with service.admission(count, param, body.model, use):
        outcomes, tokens = await service.pairs(use, given, top=top, truncate=body.truncate)

    def content() -> BaseModel:
        data = [
            {"index": number, "image": image, "text": text, result: outcome}
            for number, ((image, text), outcome) in enumerate(zip(given.pairs(), outcomes, strict=True))
        ]
        listed = {"data": data, "model": service.model_for(use).name, "usage": Usage.of(tokens)}
        return response.model_validate(listed, from_attributes=True)

    return await long_json_of(content, _num_values(outcomes))


def _num_values(outcome: Any) -> int:
    return sum(map(_num_values, outcome)) if isinstance(outcome, list) else 1


@router.post("/v1/explain", response_model=ExplainResponse, responses=COMPUTING)
async def explain(body: ExplainRequest, service: Served) -> Response:
    """Compute the cross-attention of each word of a text over an image, which is not what decides the match."""
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
                usage=Usage.of(service.main.tokens([image], [ids])),
            )

        return await long_json_of(answer, attention.maps.numel())


def _data_uri(view: Image.Image) -> str:
    stream = io.BytesIO()
    view.save(stream, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
