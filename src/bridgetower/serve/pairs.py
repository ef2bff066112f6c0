"""What the model says about pictures together with texts: `POST /v1/match`, `/v1/answer` and `/v1/fill-mask`."""

from __future__ import annotations

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from bridgetower.serve.bodies import JsonRoute
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
    long_json_of,
    num_pairs,
    paired,
)
from bridgetower.serve.service import Served

router = APIRouter(route_class=JsonRoute, tags=["pictures with texts"])


class MatchRequest(Body):
    """Pictures and texts; the first picture goes with the first text."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"images": PICTURE, "texts": ["a red square", "two dogs in the snow"], "all_pairs": True}]
        }
    )

    images: Pictures
    texts: Texts
    all_pairs: bool = Field(False, description="Match every picture with every text.")
    truncate: Truncate = False


class Match(BaseModel):
    """A picture and a text."""

    image: int = Field(description="Number of the picture.")
    text: int = Field(description="Number of the text.")
    probability: float = Field(description="That they belong together.")


class MatchResponse(Listed[Match]):
    """A probability for every pair; with `all_pairs`, those of the first picture come first."""


class AnswerRequest(Body):
    """Pictures and a question about each."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"images": PICTURE, "questions": "what colour is the square?", "top": 3}]}
    )

    images: Pictures
    questions: Texts
    top: Top = 5
    truncate: Truncate = False


class Answer(BaseModel):
    """An answer."""

    label: str
    probability: float = Field(description="Of this answer alone: they do not sum to one.")


class Answers(BaseModel):
    """The answers to a question, likeliest first."""

    index: int
    answers: list[Answer]


class AnswerResponse(Listed[Answers]):
    """Answers to every question."""


class FillMaskRequest(Body):
    """Pictures and a text about each, with masks where words are missing."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"images": PICTURE, "texts": "a <mask> square"}]})

    images: Pictures
    texts: Texts
    top: Top = 5
    truncate: Truncate = False


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


@router.post("/v1/match", response_model=MatchResponse, responses=COMPUTING)
async def match(body: MatchRequest, service: Served) -> Response:
    """Say how well pictures and texts belong together."""
    service.check_use("match")
    count = num_pairs(body.images, body.texts, all_pairs=body.all_pairs)
    with service.admission(count, "images", body.model):
        pairs = paired(body.images, body.texts, all_pairs=body.all_pairs)
        outcomes, tokens = await service.pairs("match", body.images, body.texts, pairs, truncate=body.truncate)
    data = [
        Match(image=image, text=text, probability=probability)
        for (image, text), probability in zip(pairs, outcomes, strict=True)
    ]
    return json_of(MatchResponse(data=data, model=service.name, usage=Usage.of(tokens)))


@router.post("/v1/answer", response_model=AnswerResponse, responses=COMPUTING)
async def answer(body: AnswerRequest, service: Served) -> Response:
    """Answer questions about pictures, with a model that was fine-tuned on VQA."""
    service.check_use("answer")
    with service.admission(num_pairs(body.images, body.questions), "images", body.model, service.answering):
        outcomes, tokens = await service.pairs(
            "answer",
            *(body.images, body.questions, paired(body.images, body.questions)),
            params=("images", "questions"),
            top=body.top,
            truncate=body.truncate,
        )

    def response() -> AnswerResponse:
        data = [
            Answers(index=number, answers=[Answer(**vars(choice)) for choice in choices])
            for number, choices in enumerate(outcomes)
        ]
        return AnswerResponse(data=data, model=service.answering.name, usage=Usage.of(tokens))

    return await long_json_of(response, sum(map(len, outcomes)))


@router.post("/v1/fill-mask", response_model=FillMaskResponse, responses=COMPUTING)
async def fill_mask(body: FillMaskRequest, service: Served) -> Response:
    """Fill masked words of texts about pictures."""
    service.check_use("fill-mask")
    with service.admission(num_pairs(body.images, body.texts), "images", body.model):
        pairs = paired(body.images, body.texts)
        outcomes, tokens = await service.pairs(
            "fill_mask", body.images, body.texts, pairs, top=body.top, truncate=body.truncate
        )

    def response() -> FillMaskResponse:
        data = [
            Filled(index=number, masks=[[Word(**vars(word)) for word in words] for words in masks])
            for number, masks in enumerate(outcomes)
        ]
        return FillMaskResponse(data=data, model=service.name, usage=Usage.of(tokens))

    return await long_json_of(response, sum(len(words) for masks in outcomes for words in masks))
