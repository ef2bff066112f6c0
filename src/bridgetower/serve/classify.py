"""`POST /v1/classify`: by a head that was trained on a table of one's own, or by labels that come with the images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Len
from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from bridgetower.inference import Item
from bridgetower.serve.config import MOST_ITEMS, MOST_TOP
from bridgetower.serve.errors import ApiError
from bridgetower.serve.inputs import IMAGE
from bridgetower.serve.pairs import Choice, PairRequest, handler_of
from bridgetower.serve.schemas import COMPUTING, Images, JsonRoute, Listed, Texts, Top, list_of
from bridgetower.serve.service import PairInputs, Served, Service
from bridgetower.zero_shot import TEMPLATES, label_choices, prompts_of

router = APIRouter(route_class=JsonRoute, tags=["images with texts"])

Phrase = Annotated[str, Len(max_length=1000)]
Phrases = Annotated[list[Phrase], Len(1, MOST_ITEMS)]


class Classified(BaseModel):
    """The classes of an input, likeliest first."""

    index: int
    classes: list[Choice]


_EXAMPLES = [{"images": IMAGE, "texts": "a red square"}, {"images": IMAGE, "labels": ["a red square", "two dogs"]}]


class ClassifyRequest(PairRequest, json_schema_extra={"examples": _EXAMPLES}):
    """Classify images by labels, or images, texts or both with a model fine-tuned on a table of one's own."""

    use = "classify"
    entry = Classified
    images: Images | None = None  # type: ignore[assignment]  # here one of the two may be missing
    texts: Texts | None = None  # type: ignore[assignment]
    labels: Phrases | None = Field(None, description="Classes to compare images with; without, those of the model.")
    templates: Phrases = Field(list(TEMPLATES), description="Texts with {} where a label goes; its vector is the mean.")
    top: Top | None = Field(None, description="Classes per input; all if left out.")

    def inputs(self) -> PairInputs:
        """Returns the images and texts, with None or "" in the place of those that are missing."""
        if self.images is None and self.texts is None:
            raise ApiError(400, "neither images nor texts given; expected one of them at least", param="images")
        images: Sequence[str | None] = self.images or [None] * len(self.texts or ())
        return PairInputs(images=images, texts=self.texts or [""] * len(images))


_by_head = handler_of(ClassifyRequest)


@router.post("/v1/classify", response_model=Listed[Classified], responses=COMPUTING)
async def classify(body: ClassifyRequest, service: Served) -> Response:
    """Classify images by labels, or images, texts or both with a model fine-tuned on a table of one's own."""
    if body.labels is not None:
        return await _by_labels(body, service, body.labels)
    if "templates" in body.model_fields_set:
        raise ApiError(400, "templates are for labels; give labels too, or neither", param="templates")
    response: Response = await _by_head(body, service)
    return response


async def _by_labels(body: ClassifyRequest, service: Service, labels: list[str]) -> Response:
    if body.images is None or body.texts is not None:
        raise ApiError(400, "labels are compared with images alone; give images and no texts", param="labels")
    count = len(body.images) + len(labels) * len(body.templates)
    with service.admission(count, "labels", body.model, "embeddings", images=body.images):
        most = MOST_TOP * service.config.max_items
        if len(body.images) * (results := min(body.top or len(labels), len(labels))) > most:
            message = f"labels: {len(body.images)} images with {results} labels each, the limit is {most}; send top"
            raise ApiError(413, message, param="labels")
        try:
            prompts = prompts_of(labels, body.templates)
        except ValueError as error:
            raise ApiError(400, str(error), param="labels") from error
        images = await service.inputs.images(body.images, "images")
        texts = await service.inputs.texts(prompts, "labels", truncate=body.truncate)
        items = [*(Item(image=image.pixels) for image in images), *(Item(ids=ids) for ids in texts)]
        vectors = torch.stack(await service.batcher.submit(items))

    def rows() -> Iterator[Mapping[str, Any]]:
        chosen = label_choices(
            service.main.predictor.model, vectors[: len(images)], vectors[len(images) :], labels, body.top
        )
        for number, classes in enumerate(chosen):
            yield {"index": number, "classes": classes}

    tokens = service.main.tokens(images, texts)
    return await list_of(rows, Classified, parts=len(images) * results, model=service.name, tokens=tokens)
