"""What the routes use: one model or two, and their queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import torch
from fastapi import Depends, Request
from torch import Tensor

from bridgetower.attention import Explanation as Attention
from bridgetower.inference import HEAD_OF, Choice, FilledWord, Item, Kind, Tokens, assembled, choices
from bridgetower.predictor import Predictor
from bridgetower.processor import Resized
from bridgetower.processor.images import MEMORY_PER_PIXEL
from bridgetower.serve.config import MOST_TOP, ServeConfig
from bridgetower.serve.decoding import Decoders
from bridgetower.serve.errors import ApiError
from bridgetower.serve.inputs import Inputs
from bridgetower.serve.metrics import Metrics
from bridgetower.serve.queues import Batcher, QueueFullError
from bridgetower.serve.remote import RemoteImages

if TYPE_CHECKING:
    from bridgetower.search.searcher import Searcher

PairUse = Literal["match", "fill-mask", "answer", "entail", "reason", "classify"]
Use = Literal["embeddings", "match", "fill-mask", "explain", "answer", "entail", "reason", "classify"]

MIB = 2**20
_DECODER_MEMORY = 64 * MIB  # beside that for pixels and files
_HEADS: dict[str, str] = {"embeddings": "itc", "match": "itm", "fill-mask": "mlm"}

QueueItem = Item | Callable[[], Attention]
"""What is computed with others of its kind, or by itself."""

Outcome = Tensor | float | list[Choice] | list[list[FilledWord]] | Attention


def compute(predictor_of: Callable[[Item], Predictor], items: Sequence[QueueItem]) -> list[Outcome]:
    """Returns for each item what the predictor's method for it returns, those of one model computed together."""

    def computed(predictor: Predictor | None, rows: Sequence[int]) -> list[Outcome]:
        if predictor is None:
            return [items[row]() for row in rows]  # type: ignore[operator]
        chosen = [cast(Item, items[row]) for row in rows]
        outcomes: list[Outcome] = [*predictor.compute(chosen)]
        for number, (item, found) in enumerate(zip(chosen, outcomes, strict=True)):
            if item.kind in HEAD_OF and isinstance(found, Tensor):
                outcomes[number] = choices(found[None], predictor.class_names(HEAD_OF[item.kind]), item.top)[0]
        return outcomes

    return assembled([predictor_of(item) if isinstance(item, Item) else None for item in items], computed)


def paired(images: int, texts: int, *, all_pairs: bool) -> list[tuple[int, int]]:
    """Returns the numbers of image and text of each pair, those of the first image first."""
    if all_pairs:
        return [(image, text) for image in range(images) for text in range(texts)]
    return [(number, number) for number in range(images)]


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model, and what prepares its inputs."""

    name: str
    predictor: Predictor
    inputs: Inputs

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

    def tokens(self, images: Sequence[Resized], texts: Sequence[Tokens]) -> int:
        """Returns how many positions the towers read: those of texts, and a patch or a CLS each of images."""
        return len(images) * self.predictor.model.config.vision.num_tokens + sum(map(len, texts))

    def pair(self) -> Item:
        """Returns a pair to compute before the first request, which runs all of the model but its heads."""
        processor = self.predictor.processor
        side = processor.config.image_size
        ids = (processor.bos_token_id, processor.eos_token_id)
        return Item(image=torch.zeros(3, side, side, dtype=torch.uint8), ids=ids)


class Service:
    """A model behind a queue, perhaps with an index, and perhaps a second one that answers questions."""

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
        decoders = Decoders(max_pixels=pixels, memory=MEMORY_PER_PIXEL * pixels + 3 * body + _DECODER_MEMORY)
        remote = RemoteImages(config.allow_host, max_bytes=body, timeout=config.timeout) if config.allow_host else None

        def served(name: str | None, predictor: Predictor) -> ServedModel:
            inputs = Inputs(predictor.processor, decoders, remote=remote)
            return ServedModel(name=name or predictor.source, predictor=predictor, inputs=inputs)

        self.main = served(config.name, predictor)
        self.answering = self.main if answering is None else served(None, answering)
        self.models = [self.main] if answering is None else [self.main, self.answering]
        self.name, self.inputs = self.main.name, self.main.inputs
        self._batcher: Batcher[QueueItem, Any] | None = None
        self._warm = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs the queue during the block; at its end, admitted items are finished."""
        self._batcher = Batcher(
            lambda items: compute(lambda item: self.model_for(item.kind).predictor, items),
            max_batch=self.max_batch,
            queue=self.config.queue,
            metrics=self.metrics,
        )
        first = [self.main.pair(), *(replace(model.pair(), kind="answer") for model in self.models[1:])]
        await asyncio.gather(
            self._batcher.submit(first),
            asyncio.to_thread(lambda: [model.predictor.fingerprint for model in self.models]),  # slow, and is kept
            asyncio.to_thread(self.inputs.warm),
        )
        self.metrics.model.labels(self.name, self.main.predictor.fingerprint).set(1)
        self._warm = True
        try:
            yield
        finally:
            self._warm = False
            await self._batcher.close()
            for model in self.models:
                model.inputs.close()

    @property
    def ready(self) -> bool:
        """Whether it has computed something and still can."""
        return self._warm and self.batcher.alive

    @property
    def batcher(self) -> Batcher[QueueItem, Any]:
        if self._batcher is None:
            raise RuntimeError("the service does not run; use it within running()")
        return self._batcher

    @contextmanager
    def admission(
        self,
        count: int,
        param: str,
        name: str | None,
        use: Use | None = None,
        *,
        images: Iterable[str | None] = (),
    ) -> Iterator[None]:
        """Checks that a request can be served, and keeps room for its items."""
        model = self.main if use is None else self.model_for(use)
        if use is not None and (lacking := model.lacking(use)):
            raise ApiError(400, lacking, code="unsupported_by_model")
        if name not in (None, model.name):
            message = f"model is {name!r}; this server has {model.name!r}"
            more = " for this" if len(self.models) > 1 else ""
            raise ApiError(404, message + more, param="model", code="model_not_found")
        if count > self.config.max_items:
            message = f"{param}: {count} items, the limit is {self.config.max_items}; send several requests"
            raise ApiError(413, message, param=param)
        try:
            with self.batcher.admission(count, fetches=self.inputs.fetches(images)):
                yield
        except QueueFullError as error:
            headers = {"Retry-After": str(error.retry_after)}
            raise ApiError(429, f"the server is busy: {error}", headers=headers) from error

    def model_for(self, use: Use | Kind) -> ServedModel:
        """Returns the model for a use: the second one for uses of a fine-tuned head, if it has that head."""
        return self.answering if use in HEAD_OF and self.answering.lacking(use) is None else self.main

    def uses(self, model: ServedModel) -> list[Use]:
        return [use for use in get_args(Use) if self.model_for(use) is model and model.lacking(use) is None]

    async def pairs(
        self,
        use: PairUse,
        images: Sequence[str | None],
        texts: Sequence[str],
        *,
        images_2: Sequence[str] = (),
        all_pairs: bool = False,
        params: tuple[str, str] = ("images", "texts"),
        top: int = 1,
        truncate: bool = False,
    ) -> tuple[list[Any], int]:
        """Computes image n with text n, or all pairs; None in the place of an image is none.

        Returns what was computed, and how many positions the towers read.
        """
        model, (image_param, text_param) = self.model_for(use), params
        decoded = iter(await model.inputs.images([image for image in images if image is not None], image_param))
        blank = model.predictor.processor.blank_image()
        first = [blank if image is None else next(decoded) for image in images]
        second = await model.inputs.images(images_2, "images_2")
        ids = await model.inputs.texts(texts, text_param, truncate=truncate)
        if use == "fill-mask":
            processor, most = model.predictor.processor, MOST_TOP * self.config.max_items
            masks = [one.count(processor.mask_token_id) for one in ids]
            if 0 in masks:
                message = f"no mask in text {masks.index(0)}; put {processor.mask_token} where a word is missing"
                raise ApiError(400, f"{text_param}: {message}", param=text_param)
            if sum(masks) * top > most:
                message = f"{sum(masks)} masks with {top} words each, the limit is {most} words; ask for fewer"
                raise ApiError(413, f"{text_param}: {message}", param=text_param)
        items = [
            Item(
                kind=cast(Kind, use.replace("-", "_")),
                image=first[image].pixels,
                image_2=second[image].pixels if second else None,
                ids=ids[text],
                top=top,
            )
            for image, text in paired(len(images), len(texts), all_pairs=all_pairs)
        ]
        return await self.batcher.submit(items), model.tokens([*first, *second], ids)


async def _served(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Served = Annotated[Service, Depends(_served)]
"""The service, as an argument of a route."""
