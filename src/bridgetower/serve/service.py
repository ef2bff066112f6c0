"""What the routes use: one model or two, and their queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from fastapi import Depends, Request
from torch import Tensor

from bridgetower.inference.attention import Explanation as Attention
from bridgetower.inference.attention import Method, attention_of
from bridgetower.inference.items import (
    HEAD_OF,
    Choice,
    Item,
    Kind,
    LikeliestTokens,
    Pixels,
    Tokens,
    assembled,
    choices,
)
from bridgetower.inference.predictor import Predictor
from bridgetower.processor.images import MEMORY_PER_PIXEL
from bridgetower.serve.config import ServeConfig
from bridgetower.serve.costs import Unit, unit_costs
from bridgetower.serve.errors import ApiError
from bridgetower.serve.inputs import Decoders, Inputs
from bridgetower.serve.metrics import Metrics
from bridgetower.serve.queues import Scheduler, Turns, Work
from bridgetower.serve.remote import RemoteImages
from bridgetower.serve.replicas import all_listen

if TYPE_CHECKING:
    from bridgetower.search.searcher import Searcher

Use = Literal[
    "embeddings", "match", "fill-mask", "explain", "answer", "entail", "reason", "classify"
]

MIB = 2**20
_DECODER_MEMORY = 64 * MIB  # beside that for pixels and files
_HEADS: dict[str, str] = {"embeddings": "itc", "match": "itm", "fill-mask": "mlm"}


@dataclass(frozen=True, eq=False)
class Explaining:
    """An image and a text whose attention is asked for, which is computed by itself."""

    image: Pixels
    ids: Tokens
    method: Method


QueueItem = Item | Explaining
Outcome = Tensor | float | list[Choice] | LikeliestTokens | Attention


def compute(
    predictor_of: Callable[[QueueItem], Predictor], items: Sequence[QueueItem]
) -> list[Outcome]:
    """Returns for each item what the predictor's method for it returns, those of one model computed together."""

    def computed(key: tuple[Predictor, type], rows: Sequence[int]) -> list[Outcome]:
        predictor, kind = key
        if kind is Explaining:
            explained = [cast(Explaining, items[row]) for row in rows]
            return [attention_of(predictor, one.image, one.ids, one.method) for one in explained]
        chosen = [cast(Item, items[row]) for row in rows]
        outcomes: list[Outcome] = [*predictor.compute(chosen)]
        for number, (item, found) in enumerate(zip(chosen, outcomes, strict=True)):
            if item.kind in HEAD_OF and isinstance(found, Tensor):
                outcomes[number] = choices(
                    found[None], predictor.class_names(HEAD_OF[item.kind]), item.top
                )[0]
        return outcomes

    return assembled([(predictor_of(item), type(item)) for item in items], computed)


def unit_of(item: QueueItem) -> Unit:
    if isinstance(item, Explaining):
        return "gradient" if item.method == "gradcam" else "pair"
    if item.ids is None:
        return "image"
    return "text" if item.image is None else "pair"


def lane_of(item: QueueItem) -> str:
    """Returns the name of the thread for an item: texts wait for no image, and images for nothing computed alone."""
    if isinstance(item, Explaining):
        return "explanations"
    return "texts" if item.image is None else "images"


class ServedModel(Inputs):
    """A model with what prepares its inputs."""

    def __init__(
        self, name: str, predictor: Predictor, decoders: Decoders, remote: RemoteImages | None
    ) -> None:
        super().__init__(predictor.processor, decoders, remote=remote)
        self.name, self.predictor = name, predictor

    def lacking(self, use: Use | Kind) -> str | None:
        """Returns the error of a model that lacks the head for a use; None if it has it."""
        model = self.predictor.model
        try:
            if use in HEAD_OF and not self.predictor.class_names(HEAD_OF[use]):
                return f"the {HEAD_OF[use]} head of this model predicts a number, not classes"
            if use in _HEADS:
                model.head(_HEADS[use])
        except ValueError as error:
            beside = ", and name it with --answer-model when the server is started"
            return str(error) + (beside if use == "answer" and model.vqa_head is None else "")
        return None

    def tokens(self, items: Iterable[Item]) -> int:
        """Returns how many positions the towers read: those of texts, and a patch or a CLS each of images."""
        images = {
            id(image) for item in items for image in (item.image, item.image_2) if image is not None
        }
        texts = {id(item.ids): len(item.ids) for item in items if item.ids is not None}
        return len(images) * self.predictor.model.config.vision.num_tokens + sum(texts.values())


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
        self.searcher, self.config, self.started = searcher, config, int(time.time())
        self.metrics = Metrics()
        self.max_batch = config.max_batch or (16 if predictor.device.type == "cpu" else 64)
        pixels, body = config.max_pixels * 1_000_000, config.max_body * MIB
        decoders = Decoders(
            max_pixels=pixels, memory=MEMORY_PER_PIXEL * pixels + 3 * body + _DECODER_MEMORY
        )
        remote = (
            RemoteImages(config.allow_host, max_bytes=body, timeout=config.timeout)
            if config.allow_host
            else None
        )
        self.models = [ServedModel(config.name or predictor.source, predictor, decoders, remote)]
        if answering is not None:
            self.models.append(ServedModel(answering.source, answering, decoders, remote))
        self.main, self.answering = self.models[0], self.models[-1]
        self.costs = unit_costs(predictor.model.config, predictor.processor.config.max_length)
        # One thread: while it writes, no other thread of Python runs.
        self.writers = Turns(1, "writers")
        self._warm = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs the queue during the block; at its end, admitted items are finished."""
        self.scheduler = Scheduler(
            lambda items: compute(self._predictor_of, items),
            lambda item: Work(lane_of(item), self.costs[unit_of(item)]),
            lanes={"texts": self.max_batch, "images": self.max_batch, "explanations": 1},
            queue=self.config.queue,
            metrics=self.metrics,
        )
        first: list[QueueItem] = []  # a pair of each model, which runs all of it but its heads
        for model in self.models:
            processor = model.predictor.processor
            kind: Kind = "embedding" if model is self.main else "answer"
            ids = tuple(processor.token_ids([""])[0])
            first.append(Item(kind=kind, image=processor.blank_image().pixels, ids=ids))
        await asyncio.gather(
            self.scheduler.submit(first),
            asyncio.to_thread(
                lambda: [model.predictor.fingerprint for model in self.models]
            ),  # slow, and is kept
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
        use: Use | None = None,
        *,
        images: Iterable[str | None] = (),
    ) -> Iterator[None]:
        """Checks that a request can be served, and keeps room for its items and the words of its response."""
        model = self.main if use is None else self.model_for(use)
        if use is not None and (lacking := model.lacking(use)):
            raise ApiError(400, lacking, code="unsupported_by_model")
        if name not in (None, model.name):
            message = f"model is {name!r}; this server has {model.name!r}"
            more = " for this" if len(self.models) > 1 else ""
            raise ApiError(404, message + more, param="model", code="model_not_found")
        count = sum(number for unit, number in work.items() if unit != "word")
        if count > self.config.max_items:
            message = f"{param}: {count} items, the limit is {self.config.max_items}; send several requests"
            raise ApiError(413, message, param=param)
        cost = sum(self.costs[unit] * number for unit, number in work.items())
        with self.scheduler.admission(cost, fetches=self.main.fetches(images)):
            yield

    def _predictor_of(self, item: QueueItem) -> Predictor:
        served = self.model_for(item.kind) if isinstance(item, Item) else self.main
        return served.predictor

    def model_for(self, use: Use | Kind) -> ServedModel:
        """Returns the model for a use: the second one for uses of a fine-tuned head, if it has that head."""
        return (
            self.answering if use in HEAD_OF and self.answering.lacking(use) is None else self.main
        )


async def _served(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Served = Annotated[Service, Depends(_served)]
"""The service, as an argument of a route."""
