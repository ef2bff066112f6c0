"""The served models, their queue, and the admission of requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from fastapi import Depends, Request, Response
from torch import Tensor

from bridgetower.inference.attention import Explanation, Method, attention_of
from bridgetower.inference.items import (
    Choice,
    Item,
    Kind,
    LikeliestTokens,
    Pixels,
    Tokens,
    choices,
    grouped,
)
from bridgetower.inference.predictor import Predictor
from bridgetower.model.heads import chosen_heads
from bridgetower.processor.images import MEMORY_PER_PIXEL
from bridgetower.serve.config import ServeConfig
from bridgetower.serve.costs import Unit, unit_costs
from bridgetower.serve.errors import ApiError
from bridgetower.serve.inputs import Decoders, Inputs
from bridgetower.serve.metrics import Metrics
from bridgetower.serve.queues import Scheduler, Turns, Work
from bridgetower.serve.remote import RemoteImages
from bridgetower.serve.replicas import all_listen
from bridgetower.serve.schemas import json_of, listed

if TYPE_CHECKING:
    from bridgetower.search.searcher import Searcher

Use = Literal[
    "embeddings", "match", "fill-mask", "explain", "answer", "entail", "reason", "classify"
]

MIB = 2**20
_DECODER_MEMORY = 64 * MIB  # beside that for pixels and files
HEADS: Mapping[Use, str | None] = {
    "embeddings": "itc",
    "match": "itm",
    "fill-mask": "mlm",
    "explain": None,
    "answer": "vqa",
    "entail": "snli_ve",
    "reason": "nlvr2",
    "classify": "classification",
}
"""The head that each use needs."""
_PRETRAINED = (None, "itc", "itm", "mlm")


@dataclass(frozen=True, eq=False)
class Explaining:
    """An image and a text whose attention is computed, alone."""

    image: Pixels
    ids: Tokens
    method: Method


QueueItem = Item | Explaining
Outcome = Tensor | float | list[Choice] | LikeliestTokens | Explanation


def compute_queued(
    predictor_of: Callable[[QueueItem], Predictor], items: Sequence[QueueItem]
) -> list[Outcome]:
    """Returns for each item the result of the predictor's method for it. Items of one model are computed together."""
    outcomes: list[Outcome] = [0.0] * len(items)
    groups = grouped(range(len(items)), lambda row: (predictor_of(items[row]), type(items[row])))
    for (predictor, kind), rows in groups.items():
        if kind is Explaining:
            for row in rows:
                pair = cast(Explaining, items[row])
                outcomes[row] = attention_of(predictor, pair.image, pair.ids, pair.method)
            continue

        batch = [cast(Item, items[row]) for row in rows]
        for row, item, result in zip(rows, batch, predictor.compute(batch), strict=True):
            outcomes[row] = result
            if item.head and isinstance(result, Tensor):
                names = predictor.class_names(item.head)
                classes = choices(result[None], names, item.top) if names else []
                outcomes[row] = classes[0] if names else float(result)
    return outcomes


def unit_of(item: QueueItem) -> Unit:
    if isinstance(item, Explaining):
        return "gradient" if item.method == "gradcam" else "pair"
    if item.ids is None:
        return "image"
    return "text" if item.image is None else "pair"


def lane_of(item: QueueItem) -> str:
    """Returns the lane of an item. Texts wait for no image, and images for no explanation."""
    if isinstance(item, Explaining):
        return "explanations"
    return "texts" if item.image is None else "images"


class ServedModel(Inputs):
    """A model with its preparation of inputs."""

    def __init__(
        self, name: str, predictor: Predictor, decoders: Decoders, remote: RemoteImages | None
    ) -> None:
        super().__init__(predictor.processor, decoders, remote=remote)
        self.name = name
        self.predictor = predictor

    def lacking(self, head: str | None, *, numbers: bool = False) -> str | None:
        """Returns the error of a model that lacks a head or its classes, None for a usable head.

        Args:
            head: Its name; None is always there.
            numbers: Whether a head that predicts a number can be used.
        """
        model = self.predictor.model
        try:
            if head is not None:
                model.head(head)
            if head not in _PRETRAINED and not self.predictor.class_names(head) and not numbers:
                return f"the {head} head of this model predicts a number, not classes"
        except ValueError as error:
            if head == "vqa" and model.vqa_head is None:
                return f"{error}, and name it with --answer-model when the server is started"
            return str(error)
        return None

    @property
    def predicting(self) -> list[str]:
        """The heads that `predict` serves."""
        model = self.predictor.model
        return [
            head
            for head in chosen_heads(model.config.heads)
            if model.head_outputs(head) != "other" and self.lacking(head, numbers=True) is None
        ]

    def tokens(self, items: Iterable[Item]) -> int:
        """Counts the positions that the towers read: tokens of texts, and patches and a CLS of images."""
        images = set[int]()
        text_lengths = dict[int, int]()
        for item in items:
            images |= {id(image) for image in (item.image, item.image_2) if image is not None}
            if item.ids is not None:
                text_lengths[id(item.ids)] = len(item.ids)
        num_tokens = self.predictor.model.config.vision.num_tokens
        return len(images) * num_tokens + sum(text_lengths.values())


class Service:
    """A model behind a queue, perhaps with an index, and perhaps a second one that answers questions."""

    scheduler: Scheduler[QueueItem, Any]  # from `running` on

    def __init__(
        self,
        predictor: Predictor,
        config: ServeConfig,
        searcher: Searcher | None = None,
        answering: Predictor | None = None,
    ) -> None:
        self.searcher = searcher
        self.config = config
        self.started = int(time.time())
        self.metrics = Metrics()
        self.max_batch = config.max_batch or (16 if predictor.device.type == "cpu" else 64)

        # Images are decoded within limits of memory, and fetched from allowed hosts.
        pixels = config.max_pixels * 1_000_000
        max_bytes = config.max_body * MIB
        memory = MEMORY_PER_PIXEL * pixels + 3 * max_bytes + _DECODER_MEMORY
        decoders = Decoders(max_pixels=pixels, memory=memory)
        remote = None
        if config.allow_host:
            remote = RemoteImages(config.allow_host, max_bytes=max_bytes, timeout=config.timeout)

        self.models = [ServedModel(config.name or predictor.source, predictor, decoders, remote)]
        if answering is not None:
            self.models.append(ServedModel(answering.source, answering, decoders, remote))
        self.main = self.models[0]
        self.answering = self.models[-1]
        self.costs = unit_costs(predictor.model.config, predictor.processor.config.max_length)
        # One thread: while it writes, no other thread of Python runs.
        self.writers = Turns(1, "writers")
        self._warm = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs the queue during the block, at whose end admitted items are finished."""
        self.scheduler = Scheduler(
            lambda items: compute_queued(self._predictor_of, items),
            lambda item: Work(lane_of(item), self.costs[unit_of(item)]),
            lanes={"texts": self.max_batch, "images": self.max_batch, "explanations": 1},
            queue=self.config.queue,
            metrics=self.metrics,
        )
        # A pair for each model, which runs all of it but its heads.
        pairs: list[QueueItem] = []
        for model in self.models:
            processor = model.predictor.processor
            kind: Kind = "embedding" if model is self.main else "prediction"
            head = "" if model is self.main else "vqa"
            ids = tuple(processor.token_ids([""])[0])
            pairs.append(Item(kind=kind, head=head, image=processor.blank_image().pixels, ids=ids))

        # Fingerprints are slow to compute, and are kept.
        await asyncio.gather(
            self.scheduler.submit(pairs),
            asyncio.to_thread(lambda: [model.predictor.fingerprint for model in self.models]),
            asyncio.to_thread(self.main.warm),
        )
        self.metrics.model.labels(self.main.name, self.main.predictor.fingerprint).set(1)
        self._warm = True
        try:
            yield
        finally:
            self._warm = False
            await self.scheduler.close()
            for model in self.models:
                model.close()
            self.writers.close()

    @property
    def ready(self) -> bool:
        """Whether it has computed something and still can, and the other replicas listen too."""
        return self._warm and self.scheduler.alive and all_listen(self.config.replicas)

    @contextmanager
    def admission(
        self,
        work: Mapping[Unit, int],
        param: str,
        name: str | None,
        head: str | None = None,
        *,
        images: Iterable[str | None] = (),
        numbers: bool = False,
    ) -> Iterator[None]:
        """Checks that a request can be served, and keeps room for its items and the words of its response."""
        model = self.model_for(head)
        if lacking := model.lacking(head, numbers=numbers):
            raise ApiError(400, lacking, code="unsupported_by_model")
        if name not in (None, model.name):
            message = f"model is {name!r}; this server has {model.name!r}"
            if len(self.models) > 1:
                message += " for this"
            raise ApiError(404, message, param="model", code="model_not_found")
        count = sum(number for unit, number in work.items() if unit != "word")
        if count > self.config.max_items:
            message = f"{param}: {count} items, the limit is {self.config.max_items}; send several requests"
            raise ApiError(413, message, param=param)
        cost = sum(self.costs[unit] * number for unit, number in work.items())
        with self.scheduler.admission(cost, fetches=self.main.fetches(images)):
            yield

    def _predictor_of(self, item: QueueItem) -> Predictor:
        head = item.head if isinstance(item, Item) else ""
        return self.model_for(head or None).predictor

    def model_for(self, head: str | None) -> ServedModel:
        """Returns the second model for a fine-tuned head that it has, else the first."""
        is_second = head not in _PRETRAINED and self.answering.lacking(head, numbers=True) is None
        return self.answering if is_second else self.main

    async def list_response(
        self,
        rows: Iterable[Mapping[str, Any]],
        items: Iterable[Item],
        model: ServedModel | None = None,
    ) -> Response:
        """Returns a list as JSON, with the model and the tokens of the items that it read."""
        model = model or self.main
        return await json_of(self.writers, listed(rows, model.name, model.tokens(items)))


async def _service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


Served = Annotated[Service, Depends(_service)]
"""The service, as an argument of a route."""
