"""Routes for images with texts: one for each kind of result, from a table, and explanations."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from fastapi import APIRouter, Response
from PIL import Image
from pydantic import BaseModel, Field

from bridgetower.serve.errors import ApiError
from bridgetower.serve.inputs import IMAGE
from bridgetower.serve.schemas import (
    COMPUTING,
    PROBABILITY,
    SCORE,
    Body,
    Images,
    JsonRoute,
    Listed,
    Source,
    Text,
    Texts,
    Top,
    Usage,
    list_of,
    long_json_of,
)
from bridgetower.serve.service import PairInputs, PairUse, Served, ServedModel

router = APIRouter(route_class=JsonRoute, tags=["images with texts"])

_ALL = 2**31  # classes: there are fewer
_DIGITS = 6  # of a share of attention, after the point
_QUALITY = 88  # of the JPEG of a view


class Match(BaseModel):
    """An image and a text; with `all_pairs`, the pairs of the first image come first."""

    image: int = Field(description="Number of the image.")
    text: int = Field(description="Number of the text.")
    probability: float | None = PROBABILITY
    score: float | None = SCORE


class Choice(BaseModel):
    """A class that the model can choose."""

    label: str
    probability: float = Field(description="Over all of them, or of each on its own where several may hold.")


class Answers(BaseModel):
    """The answers to a question, likeliest first."""

    index: int
    answers: list[Choice] = Field(description="Whose probabilities do not sum to one.")


class Word(BaseModel):
    """A candidate for a masked word."""

    word: str
    probability: float


class Filled(BaseModel):
    """For each mask of a text, words, likeliest first."""

    index: int
    masks: list[list[Word]]


class Judged(BaseModel):
    """The judgements of a statement, likeliest first."""

    index: int
    judgements: list[Choice]


class PairRequest(Body):
    """Images with texts.

    Attributes:
        use: Name of the route, and what it computes.
        entry: Type of an entry of the response; its last field has the result, unless `told` says otherwise.
    """

    use: ClassVar[PairUse]
    entry: ClassVar[type[BaseModel]]

    images: Images
    texts: Texts

    def inputs(self) -> PairInputs:
        """Returns the images and texts."""
        field = type(self).model_fields["texts"].alias or "texts"
        return PairInputs(images=self.images, texts=self.texts, params=("images", field))

    @classmethod
    def told(cls, outcome: Any, model: ServedModel) -> dict[str, Any]:
        """Returns the field of an entry that has what was computed, by its name."""
        *_, result = cls.entry.model_fields
        return {result: outcome}

    def most(self) -> int:
        """Returns how many classes, or words for a mask, to return."""
        top: int = getattr(self, "top", None) or _ALL
        return top


def _example(**fields: Any) -> dict[str, Any]:
    return {"examples": [{"images": IMAGE, **fields}]}


class MatchRequest(
    PairRequest, json_schema_extra=_example(texts=["a red square", "two dogs in the snow"], all_pairs=True)
):
    """Compute how well images and texts match: image n and text n, or all pairs."""

    use = "match"
    entry = Match
    all_pairs: bool = Field(False, description="Match every image with every text.")

    def inputs(self) -> PairInputs:
        """Returns the images and texts, every image with every text if this is set."""
        return replace(super().inputs(), all_pairs=self.all_pairs)

    @classmethod
    def told(cls, outcome: Any, model: ServedModel) -> dict[str, Any]:
        """Returns the probability, or the score, of log-odds."""
        return {**model.predictor.reranking.named(torch.tensor([outcome]))[0]}


class AnswerRequest(PairRequest, json_schema_extra=_example(questions="what colour is the square?", top=3)):
    """Answer questions about images, with a model that was fine-tuned on VQA."""

    use = "answer"
    entry = Answers
    texts: Texts = Field(alias="questions")
    top: Top = 5


class FillMaskRequest(PairRequest, json_schema_extra=_example(texts="a <mask> square")):
    """Fill masked words of texts about images."""

    use = "fill-mask"
    entry = Filled
    top: Top = 5


class EntailRequest(PairRequest, json_schema_extra=_example(statements="it is red")):
    """Classify whether images contradict, are neutral to or entail statements, with a model fine-tuned on SNLI-VE."""

    use = "entail"
    entry = Judged
    texts: Texts = Field(alias="statements")


class ReasonRequest(PairRequest, json_schema_extra=_example(images_2=IMAGE, statements="both are red")):
    """Classify statements about a left and a right image as true or false, with a model fine-tuned on NLVR2."""

    use = "reason"
    entry = Judged
    images_2: Images
    texts: Texts = Field(alias="statements")

    def inputs(self) -> PairInputs:
        """Returns the images and statements."""
        first, second = len(self.images), len(self.images_2)
        if first != second:
            message = f"{first} images and {second} images_2; expected a second one for each first"
            raise ApiError(400, message, param="images_2")
        return replace(super().inputs(), images_2=self.images_2)


def handler_of(request: type[PairRequest]) -> Callable[..., Any]:
    """Returns the function that handles requests of a type."""

    async def handle(body: PairRequest, service: Served) -> Response:
        given = body.inputs()
        image_param, text_param = given.params
        count = given.count() + len(given.images_2)
        param = text_param if given.images[0] is None else image_param
        images = [*given.images, *given.images_2]
        with service.admission(count, param, body.model, body.use, images=images):
            outcomes, tokens = await service.pairs(body.use, given, top=body.most(), truncate=body.truncate)

        model = service.model_for(body.use)

        def rows() -> Iterator[Mapping[str, Any]]:
            for number, ((image, text), outcome) in enumerate(zip(given.pairs(), outcomes, strict=True)):
                yield {"index": number, "image": image, "text": text, **body.told(outcome, model)}

        return await list_of(rows, body.entry, parts=_num_values(outcomes), model=model.name, tokens=tokens)

    handle.__annotations__["body"] = request
    return handle


for _request in (MatchRequest, AnswerRequest, FillMaskRequest, EntailRequest, ReasonRequest):
    router.add_api_route(
        f"/v1/{_request.use}",
        handler_of(_request),
        methods=["POST"],
        name=_request.use.replace("-", "_"),
        description=_request.__doc__,
        response_model=Listed[_request.entry],  # type: ignore[name-defined]  # made at run time
        responses=COMPUTING,
    )


class ExplainRequest(Body, json_schema_extra={"examples": [{"image": IMAGE, "text": "a red square"}]}):
    """An image and a text about it."""

    image: Source
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
    probability: float | None = PROBABILITY
    score: float | None = SCORE
    view: str | None = Field(None, description="Data URI of the part of the image that the maps cover.")
    usage: Usage


def _num_values(outcome: Any) -> int:
    return sum(map(_num_values, outcome)) if isinstance(outcome, list) else 1


@router.post("/v1/explain", response_model=ExplainResponse, responses=COMPUTING)
async def explain(body: ExplainRequest, service: Served) -> Response:
    """Compute the cross-attention of each word of a text over an image, which is not what decides the match."""
    with service.admission(1, "image", body.model, images=[body.image]):
        image, view = await service.inputs.seen(body.image, "image", view=body.view)
        (ids,) = await service.inputs.texts([body.text], "text", truncate=body.truncate)
        attention = await service.attention(image, ids)
        shown = None if view is None else await service.inputs.in_thread(lambda: _data_uri(view))

        def answer() -> ExplainResponse:
            return ExplainResponse(
                model=service.name,
                words=list(attention.words),
                maps=attention.maps.double().round(decimals=_DIGITS).tolist(),
                prefix_shares=attention.prefix_shares.tolist(),
                probability=attention.probability,
                score=attention.score,
                view=shown,
                usage=Usage.of(service.main.tokens([image], [ids])),
            )

        return await long_json_of(answer, attention.maps.numel())


def _data_uri(view: Image.Image) -> str:
    stream = io.BytesIO()
    view.save(stream, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
