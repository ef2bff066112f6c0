"""Routes for images with texts: one for each kind of result, from a table, labels for images, and explanations."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
from annotated_types import Len
from fastapi import APIRouter, Response
from PIL import Image
from pydantic import BaseModel, Field, create_model

from bridgetower.attention import attention_of, view_of, words_of
from bridgetower.inference import TEMPLATES, Item, label_choices, prompts_of
from bridgetower.processor import Resized
from bridgetower.serve.config import MOST_TOP
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
    Several,
    Source,
    Text,
    Texts,
    Top,
    Usage,
    json_of,
    listed,
    usage,
)
from bridgetower.serve.service import PairUse, Served, Service, paired

router = APIRouter(route_class=JsonRoute, tags=["images with texts"])

_ALL = 2**31  # classes: there are fewer
_DIGITS = 6  # of a share of attention, after the point
_QUALITY = 88  # of the JPEG of a view


class Choice(BaseModel):
    label: str
    probability: float = Field(description="Over all of them, or of each on its own where several may hold.")


class Word(BaseModel):
    word: str
    probability: float


class PairRequest(Body):
    images: Images
    texts: Texts


@dataclass(frozen=True, kw_only=True)
class _Verb:
    """A route: its body beside images and texts, which may have another name, and an entry of its response.

    The last field of an entry has what was computed.
    """

    about: str
    example: dict[str, Any]
    entry: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)
    texts: str = "texts"


_JUDGED = {"index": (int, ...), "judgements": (list[Choice], Field(description="Likeliest first."))}
_VERBS: dict[PairUse, _Verb] = {
    "match": _Verb(
        about="Compute how well images and texts match: image n and text n, or all pairs.",
        example={"texts": ["a red square", "two dogs in the snow"], "all_pairs": True},
        entry={
            "image": (int, Field(description="Number of the image.")),
            "text": (int, Field(description="Number of the text.")),
            "probability": (float | None, PROBABILITY),
            "score": (float | None, SCORE),
        },
        more={
            "all_pairs": (bool, Field(False, description="Match every image, the first one first, with every text."))
        },
    ),
    "answer": _Verb(
        about="Answer questions about images, with a model that was fine-tuned on VQA.",
        example={"questions": "what colour is the square?", "top": 3},
        entry={
            "index": (int, ...),
            "answers": (list[Choice], Field(description="Do not sum to one; likeliest first.")),
        },
        more={"top": (Top, 5)},
        texts="questions",
    ),
    "fill-mask": _Verb(
        about="Fill masked words of texts about images.",
        example={"texts": "a <mask> square"},
        entry={"index": (int, ...), "masks": (list[list[Word]], Field(description="For each mask, likeliest first."))},
        more={"top": (Top, 5)},
    ),
    "entail": _Verb(
        about="Classify whether images contradict, are neutral to or entail statements, with a model fine-tuned on "
        "SNLI-VE.",
        example={"statements": "it is red"},
        entry=_JUDGED,
        texts="statements",
    ),
    "reason": _Verb(
        about="Classify statements about a left and a right image as true or false, with a model fine-tuned on NLVR2.",
        example={"images_2": IMAGE, "statements": "both are red"},
        entry=_JUDGED,
        more={"images_2": (Images, ...)},
        texts="statements",
    ),
}


async def _answered(use: PairUse, result: str, body: PairRequest, service: Service) -> Response:
    """Responds with what a head of the model says of each pair."""
    if body.images is None and body.texts is None:  # which may be left out of `classify`
        raise ApiError(400, "neither images nor texts given; expected one of them at least", param="images")
    images: Sequence[str | None] = body.images or [None] * len(body.texts)
    texts, images_2 = body.texts or [""] * len(images), getattr(body, "images_2", [])
    params = ("images", type(body).model_fields["texts"].alias or "texts")
    all_pairs = getattr(body, "all_pairs", False)
    if use == "reason" and len(images) != len(images_2):
        message = f"{len(images)} images and {len(images_2)} images_2; expected a second one for each first"
        raise ApiError(400, message, param="images_2")
    if not all_pairs and len(images) != len(texts):
        raise ApiError(400, f"{len(images)} images and {len(texts)} texts; expected as many of one as of the other")
    count = len(images) * len(texts) if all_pairs else len(images) + len(images_2)
    param = params[1] if images[0] is None else params[0]
    with service.admission(count, param, body.model, use, images=[*images, *images_2]):
        outcomes, tokens = await service.pairs(
            *(use, images, texts),
            images_2=images_2,
            all_pairs=all_pairs,
            params=params,
            top=getattr(body, "top", None) or _ALL,
            truncate=body.truncate,
        )
    model = service.model_for(use)

    def rows() -> list[dict[str, Any]]:
        if use != "match":
            return [{"index": number, result: outcome} for number, outcome in enumerate(outcomes)]
        named = model.predictor.reranking.named(torch.tensor(outcomes))
        places = paired(len(images), len(texts), all_pairs=all_pairs)
        return [{"image": i, "text": t, **shown} for (i, t), shown in zip(places, named, strict=True)]

    return await json_of(lambda: listed(rows(), model.name, tokens), _num_values(outcomes))


def _num_values(outcome: Any) -> int:
    return sum(map(_num_values, outcome)) if isinstance(outcome, list) else 1


def _route(use: PairUse, verb: _Verb) -> None:
    """Adds the route of a verb."""
    name = use.title().replace("-", "")
    request = create_model(
        f"{name}Request",
        __base__=PairRequest,
        __doc__=verb.about,
        __cls_kwargs__={"json_schema_extra": {"examples": [{"images": IMAGE, **verb.example}]}},
        texts=(Texts, Field(alias=None if verb.texts == "texts" else verb.texts)),
        **verb.more,
    )
    *_, result = verb.entry

    async def handle(body: PairRequest, service: Served) -> Response:
        return await _answered(use, result, body, service)

    handle.__annotations__["body"] = request
    entry = create_model(name, **verb.entry)
    settings: dict[str, Any] = {"response_model": Listed[entry], "responses": COMPUTING}  # type: ignore[valid-type]
    router.add_api_route(
        f"/v1/{use}", handle, methods=["POST"], name=use.replace("-", "_"), description=verb.about, **settings
    )


for _use, _verb in _VERBS.items():
    _route(_use, _verb)


Phrases = Annotated[list[Annotated[str, Len(max_length=1000)]], Several]
_EXAMPLES = [{"images": IMAGE, "texts": "a red square"}, {"images": IMAGE, "labels": ["a red square", "two dogs"]}]


class ClassifyRequest(PairRequest, json_schema_extra={"examples": _EXAMPLES}):
    """Images with labels; or images, texts or both."""

    images: Images | None = None  # type: ignore[assignment]  # here one of the two may be missing
    texts: Texts | None = None  # type: ignore[assignment]
    labels: Phrases | None = Field(None, description="Classes to compare images with; without, those of the model.")
    templates: Phrases = Field(list(TEMPLATES), description="Texts with {} where a label goes; its vector is the mean.")
    top: Top | None = Field(None, description="Classes per input; all if left out.")


class Classified(BaseModel):
    index: int
    classes: list[Choice] = Field(description="Likeliest first.")


@router.post("/v1/classify", response_model=Listed[Classified], responses=COMPUTING)
async def classify(body: ClassifyRequest, service: Served) -> Response:
    """Classify images by labels, or images, texts or both with a model fine-tuned on a table of one's own."""
    if body.labels is None:
        if "templates" in body.model_fields_set:
            raise ApiError(400, "templates are for labels; give labels too, or neither", param="templates")
        return await _answered("classify", "classes", body, service)
    labels, top = body.labels, min(body.top or len(body.labels), len(body.labels))
    if body.images is None or body.texts is not None:
        raise ApiError(400, "labels are compared with images alone; give images and no texts", param="labels")
    count = len(body.images) + len(labels) * len(body.templates)
    with service.admission(count, "labels", body.model, "embeddings", images=body.images):
        if len(body.images) * top > (most := MOST_TOP * service.config.max_items):
            message = f"labels: {len(body.images)} images with {top} labels each, the limit is {most}; send top"
            raise ApiError(413, message, param="labels")
        try:
            prompts = prompts_of(labels, body.templates)
        except ValueError as error:
            raise ApiError(400, str(error), param="labels") from error
        images = await service.inputs.images(body.images, "images")
        texts = await service.inputs.texts(prompts, "labels", truncate=body.truncate)
        items = [*(Item(image=image.pixels) for image in images), *(Item(ids=ids) for ids in texts)]
        vectors = torch.stack(await service.batcher.submit(items))

    def rows() -> list[dict[str, Any]]:
        model, count = service.main.predictor.model, len(images)
        chosen = label_choices(model, vectors[:count], vectors[count:], labels, body.top)
        return [{"index": number, "classes": classes} for number, classes in enumerate(chosen)]

    tokens = service.main.tokens(images, texts)
    return await json_of(lambda: listed(rows(), service.name, tokens), len(images) * top)


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
        description="By layer, word, row and column of patches; each sums to 1."
    )
    prefix_shares: list[list[float]] = Field(description="By layer and word: what went to the class token instead.")
    probability: float | None = PROBABILITY
    score: float | None = SCORE
    view: str | None = Field(None, description="Data URI of the part of the image that the maps cover.")
    usage: Usage


@router.post("/v1/explain", response_model=ExplainResponse, responses=COMPUTING)
async def explain(body: ExplainRequest, service: Served) -> Response:
    """Compute the cross-attention of each word of a text over an image, which is not what decides the match."""
    predictor = service.main.predictor
    processor, inputs = predictor.processor, service.inputs

    def decoded(content: bytes) -> tuple[Resized, str | None]:
        if not body.view:
            return inputs.prepared(content), None
        whole, _ = inputs.decoders.open(content, background=processor.config.background)
        stream = io.BytesIO()
        view_of(processor, Image.fromarray(whole)).save(stream, "JPEG", quality=_QUALITY)
        return inputs.prepared(content), "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()

    with service.admission(1, "image", body.model, images=[body.image]):
        ((image, view),) = await inputs.decoded(decoded, [body.image], "image")
        (ids,) = await inputs.texts([body.text], "text", truncate=body.truncate)
        try:
            words_of(processor, ids)
        except ValueError as error:
            raise ApiError(400, str(error), param="text") from error
        (attention,) = await service.batcher.submit([partial(attention_of, predictor, image.pixels, ids)])
        response = {
            "model": service.name,
            "words": list(attention.words),
            "prefix_shares": attention.prefix_shares.tolist(),
            "probability": attention.probability,
            "score": attention.score,
            "view": view,
            "usage": usage(service.main.tokens([image], [ids])),
        }
        maps = attention.maps.double().round(decimals=_DIGITS)
        return await json_of(lambda: response | {"maps": maps.tolist()}, maps.numel())
