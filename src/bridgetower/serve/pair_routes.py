"""Routes that run heads of the model on images with texts, and that explain a match."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import product
from typing import Annotated, Any

import torch
from annotated_types import Len
from fastapi import APIRouter, Response
from PIL import Image
from pydantic import BaseModel, Field

from bridgetower.inference.attention import Method, view_of, words_of
from bridgetower.inference.items import (
    TEMPLATES,
    Choice,
    FilledWord,
    Item,
    Kind,
    Pixels,
    filled_words,
    label_choices,
    prompts_of,
)
from bridgetower.serve.config import MOST_TOP
from bridgetower.serve.costs import Unit
from bridgetower.serve.errors import ApiError
from bridgetower.serve.inputs import IMAGE
from bridgetower.serve.schemas import (
    COMPUTING,
    PROBABILITY,
    SCORE,
    Body,
    Images,
    JsonRoute,
    ListResponse,
    Several,
    Source,
    Text,
    Texts,
    Top,
    Usage,
    json_of,
    usage,
)
from bridgetower.serve.service import Explaining, Served, Service

router = APIRouter(route_class=JsonRoute, responses=COMPUTING, tags=["images with texts"])

_DIGITS = 6  # of a share of attention, after the point
_JPEG_QUALITY = 88  # of a view


class PairRequest(Body):
    images: Images = Field(description="One image goes with every text, but for `/v1/reason`.")
    texts: Texts


class PairInputs:
    """Images and texts of a request for a head: checked, admitted, prepared, computed."""

    def __init__(
        self,
        service: Service,
        body: PairRequest,
        head: str,
        *,
        images_2: Sequence[str] | None = None,
        all_pairs: bool = False,
    ) -> None:
        if body.images is None and body.texts is None:  # which some requests may leave out
            raise ApiError(
                400, "neither images nor texts given; expected one of them at least", param="images"
            )
        self.model = service.model_for(head)
        self.texts: Sequence[str] = body.texts or [""] * len(body.images)
        self.texts_param = type(body).model_fields["texts"].alias or "texts"
        self._service = service
        self._body = body
        self._head = head
        self._images: Sequence[str | None] = body.images or [None] * len(body.texts)
        self._images_2: Sequence[str] = images_2 or []
        self._all_pairs = all_pairs or (len(self._images) == 1 and not images_2)
        inputs = self.model.predictor.model.extensions.head_specs[head].inputs
        self._unread = {"image_cls": "texts", "text_cls": "images"}.get(inputs)
        self._check(reads_two_images=inputs == "pooled_pair")

    def _check(self, *, reads_two_images: bool) -> None:
        num_images = len(self._images)
        num_images_2 = len(self._images_2)
        if num_images_2 != (num_images if reads_two_images else 0):
            expected = "a second one for each first" if reads_two_images else "no second ones"
            raise ApiError(
                400,
                f"{num_images} images and {num_images_2} images_2; expected {expected}",
                param="images_2",
            )
        if self._unread and getattr(self._body, self._unread) is not None:
            raise ApiError(
                400,
                f"the {self._head} head reads no {self._unread}; leave them out",
                param=self._unread,
            )
        if not self._all_pairs and num_images != len(self.texts):
            raise ApiError(
                400,
                f"{num_images} images and {len(self.texts)} texts; expected as many of one as of the other",
            )

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The indices of the image and the text of each pair."""
        if self._all_pairs:
            return list(product(range(len(self._images)), range(len(self.texts))))
        return [(index, index) for index in range(len(self._images))]

    def admission(self, *, words: int = 0, numbers: bool = False) -> AbstractContextManager[None]:
        """Keeps room for the pairs and the words of a response, see `Service.admission`."""
        units: dict[str | None, Unit] = {"texts": "image", "images": "text", None: "pair"}
        count = len(self._images) + len(self._images_2)
        if self._all_pairs:
            count = len(self._images) * len(self.texts)
        return self._service.admission(
            {units[self._unread]: count, "word": words},
            "images" if self._body.images else self.texts_param,
            self._body.model,
            self._head,
            images=[*self._images, *self._images_2],
            numbers=numbers,
        )

    async def items(self, kind: Kind, top: int = 0) -> list[Item]:
        """Decodes images and tokenises texts. A pair without an image has a blank one."""
        images = await self.model.images(self._images, "images")
        images_2 = await self.model.images(self._images_2, "images_2")
        texts = await self.model.texts(self.texts, self.texts_param, truncate=self._body.truncate)
        blank = self.model.predictor.processor.blank_image().pixels
        items = []
        for image_index, text_index in self.pairs:
            image = blank if images[image_index] is None else images[image_index]
            item = Item(
                kind=kind,
                head=self._head if kind == "prediction" else "",
                image=None if self._unread == "images" else image,
                image_2=images_2[image_index] if images_2 else None,
                ids=None if self._unread == "texts" else texts[text_index],
                top=top,
            )
            items.append(item)
        return items

    async def predict(
        self, field: str, *, top: int | None = None, numbers: bool = False
    ) -> Response:
        """Responds with the likeliest classes in a field, all without `top`, or with a number."""
        with self.admission(numbers=numbers):
            items = await self.items("prediction", top or 0)
            outcomes = await self._service.scheduler.submit(items)
            rows = (
                {"index": index, "number" if isinstance(outcome, float) else field: outcome}
                for index, outcome in enumerate(outcomes)
            )
            return await self.respond(rows, items)

    async def respond(self, rows: Iterable[Mapping[str, Any]], items: list[Item]) -> Response:
        return await self._service.list_response(rows, items, self.model)


_MATCH = {"images": IMAGE, "texts": ["a red square", "two dogs in the snow"], "all_pairs": True}


class MatchRequest(PairRequest, json_schema_extra={"examples": [_MATCH]}):
    all_pairs: bool = Field(
        False, description="Match every image, the first one first, with every text."
    )


class MatchRow(BaseModel):
    image: int = Field(description="Number of the image.")
    text: int = Field(description="Number of the text.")
    probability: float | None = PROBABILITY
    score: float | None = SCORE


@router.post("/v1/match", response_model=ListResponse[MatchRow])
async def match(body: MatchRequest, service: Served) -> Response:
    """Compute how well images and texts match: image n and text n, or all pairs."""
    inputs = PairInputs(service, body, "itm", all_pairs=body.all_pairs)
    with inputs.admission():
        items = await inputs.items("match")
        log_odds = await service.scheduler.submit(items)
        scores = inputs.model.predictor.reranking.matches(torch.tensor(log_odds))
        rows = (
            {"image": image, "text": text, **score}
            for (image, text), score in zip(inputs.pairs, scores, strict=True)
        )
        return await inputs.respond(rows, items)


_ANSWER = {"images": IMAGE, "questions": "what colour is the square?", "top": 3}


class AnswerRequest(PairRequest, json_schema_extra={"examples": [_ANSWER]}):
    texts: Texts = Field(alias="questions")
    top: Top = 5


class AnswerRow(BaseModel):
    index: int
    answers: list[Choice] = Field(description="Do not sum to one; likeliest first.")


@router.post("/v1/answer", response_model=ListResponse[AnswerRow])
async def answer(body: AnswerRequest, service: Served) -> Response:
    """Answer questions about images, with a model that was fine-tuned on VQA."""
    return await PairInputs(service, body, "vqa").predict("answers", top=body.top)


_FILL_MASK = {"images": IMAGE, "texts": "a <mask> square"}


class FillMaskRequest(PairRequest, json_schema_extra={"examples": [_FILL_MASK]}):
    top: Top = 5


class MaskRow(BaseModel):
    index: int
    masks: list[list[FilledWord]] = Field(description="For each mask, likeliest first.")


@router.post("/v1/fill-mask", response_model=ListResponse[MaskRow])
async def fill_mask(body: FillMaskRequest, service: Served) -> Response:
    """Fill masked words of texts about images."""
    inputs = PairInputs(service, body, "mlm")
    param = inputs.texts_param
    processor = inputs.model.predictor.processor
    num_masks = sum(text.count(processor.mask_token) for text in inputs.texts)
    with inputs.admission(words=body.top * num_masks):
        items = await inputs.items("fill_mask", body.top)
        masks = [(item.ids or ()).count(processor.mask_token_id) for item in items]
        if 0 in masks:
            message = f"no mask in text {masks.index(0)}; put {processor.mask_token} where a word is missing"
            raise ApiError(400, f"{param}: {message}", param=param)
        limit = MOST_TOP * service.config.max_items
        if sum(masks) * body.top > limit:
            message = f"{sum(masks)} masks with {body.top} words each, the limit is {limit} words; ask for fewer"
            raise ApiError(413, f"{param}: {message}", param=param)

        tokens = await service.scheduler.submit(items)
        rows = (
            {"index": index, "masks": filled_words(processor, likeliest)}
            for index, likeliest in enumerate(tokens)
        )
        return await inputs.respond(rows, items)


class JudgementRow(BaseModel):
    index: int
    judgements: list[Choice] = Field(description="Likeliest first.")


_ENTAIL = {"images": IMAGE, "statements": "it is red"}


class EntailRequest(PairRequest, json_schema_extra={"examples": [_ENTAIL]}):
    texts: Texts = Field(alias="statements")


@router.post("/v1/entail", response_model=ListResponse[JudgementRow])
async def entail(body: EntailRequest, service: Served) -> Response:
    """Classify whether images contradict, are neutral to or entail statements, with a model fine-tuned on SNLI-VE."""
    return await PairInputs(service, body, "snli_ve").predict("judgements")


_REASON = {"images": IMAGE, "images_2": IMAGE, "statements": "both are red"}


class ReasonRequest(PairRequest, json_schema_extra={"examples": [_REASON]}):
    texts: Texts = Field(alias="statements")
    images_2: Images


@router.post("/v1/reason", response_model=ListResponse[JudgementRow])
async def reason(body: ReasonRequest, service: Served) -> Response:
    """Classify statements about a left and a right image as true or false, with a model fine-tuned on NLVR2."""
    inputs = PairInputs(service, body, "nlvr2", images_2=body.images_2)
    return await inputs.predict("judgements")


Phrases = Annotated[list[Annotated[str, Len(max_length=1000)]], Several]
_CLASSIFY = [
    {"images": IMAGE, "texts": "a red square"},
    {"images": IMAGE, "labels": ["a red square", "two dogs"]},
]


class OptionalPairRequest(PairRequest):
    """Images, texts, or both."""

    images: Images | None = None  # type: ignore[assignment]  # here one of the two may be missing
    texts: Texts | None = None  # type: ignore[assignment]
    top: Top | None = Field(None, description="Classes per input; all if left out.")


class ClassifyRequest(OptionalPairRequest, json_schema_extra={"examples": _CLASSIFY}):
    labels: Phrases | None = Field(
        None, description="Classes to compare images with; without, those of the model."
    )
    templates: Phrases = Field(
        list(TEMPLATES), description="Texts with {} where a label goes; its vector is the mean."
    )


class ClassesRow(BaseModel):
    index: int
    classes: list[Choice] = Field(description="Likeliest first.")


@router.post("/v1/classify", response_model=ListResponse[ClassesRow])
async def classify(body: ClassifyRequest, service: Served) -> Response:
    """Classify images by labels, or images, texts or both with a model fine-tuned on custom classes."""
    labels = body.labels
    if labels is None:
        if "templates" in body.model_fields_set:
            raise ApiError(
                400, "templates are for labels; give labels too, or neither", param="templates"
            )
        return await PairInputs(service, body, "classification").predict("classes", top=body.top)

    # Compare the vectors of images with those of the labels.
    if body.images is None or body.texts is not None:
        raise ApiError(
            400, "labels are compared with images alone; give images and no texts", param="labels"
        )
    num_images = len(body.images)
    work: dict[Unit, int] = {"image": num_images, "text": len(labels) * len(body.templates)}
    with service.admission(work, "labels", body.model, "itc", images=body.images):
        top = min(body.top or len(labels), len(labels))
        limit = MOST_TOP * service.config.max_items
        if num_images * top > limit:
            message = f"labels: {num_images} images with {top} labels each, the limit is {limit}; send top"
            raise ApiError(413, message, param="labels")
        try:
            prompts = prompts_of(labels, body.templates)
        except ValueError as error:
            raise ApiError(400, str(error), param="labels") from error
        images = await service.main.images(body.images, "images")
        texts = await service.main.texts(prompts, "labels", truncate=body.truncate)
        items = [*(Item(image=image) for image in images), *(Item(ids=ids) for ids in texts)]
        vectors = torch.stack(await service.scheduler.submit(items))

    classes = await asyncio.to_thread(
        label_choices,
        service.main.predictor.model,
        vectors[:num_images],
        vectors[num_images:],
        labels,
        body.top,
    )
    rows = ({"index": index, "classes": choices} for index, choices in enumerate(classes))
    return await service.list_response(rows, items)


_PREDICT = {"head": "vqa", "images": IMAGE, "texts": "what colour is the square?"}


class PredictRequest(OptionalPairRequest, json_schema_extra={"examples": [_PREDICT]}):
    head: Annotated[str, Len(1, 1000)] = Field(description="One of those in `/v1/models`.")
    images_2: Images | None = Field(None, description="For a head that reads two images.")


class PredictionRow(BaseModel):
    index: int
    classes: list[Choice] | None = Field(None, description="Likeliest first.")
    number: float | None = Field(None, description="Of a head without classes.")


@router.post("/v1/predict", response_model=ListResponse[PredictionRow])
async def predict_by_head(body: PredictRequest, service: Served) -> Response:
    """Predict classes or a number by a head of the model, of the package or custom."""
    predicting = service.model_for(body.head).predicting
    if body.head not in predicting:
        names = ", ".join(predicting) or "none"
        raise ApiError(
            400,
            f"there is no head {body.head!r} to predict with; expected one of {names}",
            param="head",
            code="unsupported_by_model",
        )
    inputs = PairInputs(service, body, body.head, images_2=body.images_2)
    return await inputs.predict("classes", top=body.top, numbers=True)


_EXPLAIN = {"image": IMAGE, "text": "a red square"}


class ExplainRequest(Body, json_schema_extra={"examples": [_EXPLAIN]}):
    image: Source
    text: Text = Field(description="With at least one word.")
    method: Method = Field(
        "attention", description="`gradcam` weighs it by the gradient of the matching head."
    )
    view: bool = Field(False, description="Also return the part of the image that the model sees.")


class ExplainResponse(BaseModel):
    """The cross-attention of each word over the image, or its Grad-CAM, mean over the heads, layer by layer."""

    model: str = Field(description="That answered.")
    method: Method = Field(description="That was asked for.")
    words: list[str] = Field(description="Of the text; with `gradcam` its class token before them.")
    maps: list[list[list[list[float]]]] = Field(
        description="By layer, word, row and column; of attention each sums to 1."
    )
    prefix_shares: list[list[float]] = Field(
        description="By layer and word: what went to the class token instead."
    )
    probability: float | None = PROBABILITY
    score: float | None = SCORE
    view: str | None = Field(
        None, description="Data URI of the part of the image that the maps cover."
    )
    usage: Usage


@router.post("/v1/explain", response_model=ExplainResponse)
async def explain_match(body: ExplainRequest, service: Served) -> Response:
    """Compute where each word of a text looks in an image, or by Grad-CAM what of it decides the match."""
    model = service.main
    processor = model.predictor.processor

    def decode(content: bytes) -> tuple[Pixels, str | None]:
        """Returns the image as the model gets it and, if requested, its view as a data URI."""
        pixels = model.prepared(content).pixels
        if not body.view:
            return pixels, None
        whole, _ = model.decoders.open(content, background=processor.config.background)
        stream = io.BytesIO()
        view_of(processor, Image.fromarray(whole)).save(stream, "JPEG", quality=_JPEG_QUALITY)
        return pixels, "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()

    is_gradcam = body.method == "gradcam"
    unit: Unit = "gradient" if is_gradcam else "pair"
    head = "itm" if is_gradcam else None
    with service.admission({unit: 1}, "image", body.model, head, images=[body.image]):
        ((image, view),) = await model.decoded(decode, [body.image], "image")
        (ids,) = await model.texts([body.text], "text", truncate=body.truncate)
        try:
            words_of(processor, ids)
        except ValueError as error:
            raise ApiError(400, str(error), param="text") from error
        (attention,) = await service.scheduler.submit([Explaining(image, ids, body.method)])
        maps = attention.maps.double().round(decimals=_DIGITS)
        response = {
            "model": model.name,
            "method": attention.method,
            "words": list(attention.words),
            "prefix_shares": attention.prefix_shares.tolist(),
            "probability": attention.probability,
            "score": attention.score,
            "view": view,
            "usage": usage(model.tokens([Item(image=image, ids=ids)])),
            "maps": (layer.tolist() for layer in maps),
        }
        return await json_of(service.writers, response)
