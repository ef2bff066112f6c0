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

from bridgetower.attention import Attention, attention_of, words_of
from bridgetower.inference import HEAD_OF, Choice, FilledWord, Item, Kind, Pixels, Tokens, assembled, choices
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
    from bridgetower.search.index import Index
    from bridgetower.search.searcher import Searcher

PairUse = Literal["match", "fill-mask", "answer", "entail", "reason", "classify"]
Use = Literal["embeddings", "match", "fill-mask", "explain", "answer", "entail", "reason", "classify"]

MIB = 2**20
_DECODER_MEMORY = 64 * MIB  # beside that for pixels and files

Outcome = Tensor | float | list[Choice] | list[list[FilledWord]] | Attention


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionItem:
    """An image and a text with at least one word, for their cross-attention."""

    image: Pixels
    ids: Tokens


QueueItem = Item | AttentionItem


def embedding_items(images: Sequence[Resized], texts: Sequence[Tokens], *, joint: bool) -> list[Item]:
    """Returns an item for each image and each text, or one for the only image with the only text."""
    if joint:
        return [Item(image=images[0].pixels, ids=texts[0])]
    return [*(Item(image=image.pixels) for image in images), *(Item(ids=ids) for ids in texts)]


def compute(predictor_of: Callable[[QueueItem], Predictor], items: Sequence[QueueItem]) -> list[Outcome]:
    """Returns for each item what the predictor's method for it returns, computed by its model.

    Attention is looked at pair by pair, everything else together.
    """

    def computed(predictor: Predictor, chosen: Sequence[QueueItem]) -> list[Outcome]:
        if isinstance(chosen[0], AttentionItem):
            return [attention_of(predictor, item.image, item.ids) for item in chosen if isinstance(item, AttentionItem)]
        some = [item for item in chosen if isinstance(item, Item)]
        return [_outcome(predictor, item, found) for item, found in zip(some, predictor.compute(some), strict=True)]

    keys = [(predictor_of(item), type(item)) for item in items]
    return assembled(keys, lambda key, rows: computed(key[0], [items[row] for row in rows]))


def _outcome(predictor: Predictor, item: Item, found: Tensor | float | list[list[FilledWord]]) -> Outcome:
    """Names the classes of a judgement."""
    if item.kind in HEAD_OF and isinstance(found, Tensor):
        return choices(found[None], predictor.class_names(HEAD_OF[item.kind]), item.top)[0]
    return found


@dataclass(frozen=True, kw_only=True)
class PairInputs:
    """Images of a request with its texts.

    Attributes:
        images: Data URIs, or URLs where they are allowed; None in the place of an image is none.
        texts: Likewise; an empty one is none.
        images_2: Second images, one beside each of the first.
        all_pairs: Every image goes with every text; otherwise the first with the first.
        params: Fields that images and texts come from.
    """

    images: Sequence[str | None]
    texts: Sequence[str]
    images_2: Sequence[str] = ()
    all_pairs: bool = False
    params: tuple[str, str] = ("images", "texts")

    def count(self) -> int:
        """Returns how many pairs there are, without building any."""
        images, texts = len(self.images), len(self.texts)
        if self.all_pairs:
            return images * texts
        if images != texts:
            raise ApiError(400, f"{images} images and {texts} texts; expected as many of one as of the other")
        return images

    def pairs(self) -> list[tuple[int, int]]:
        """Returns the numbers of image and text of each pair, those of the first image first."""
        if self.all_pairs:
            return [(image, text) for image in range(len(self.images)) for text in range(len(self.texts))]
        return [(number, number) for number in range(self.count())]


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model with its name and its inputs.

    Attributes:
        name: What clients call it.
        predictor: The model.
        inputs: Prepares images and texts.
    """

    name: str
    predictor: Predictor
    inputs: Inputs

    def lacking(self, use: Use | Kind) -> str | None:
        """Returns the error of a model that lacks the head for a use; None if it has it."""
        model = self.predictor.model
        heads: dict[Use | Kind, str] = {"embeddings": "itc", "match": "itm", "fill-mask": "mlm"}
        try:
            if use in HEAD_OF and not self.predictor.class_names(HEAD_OF[use]):
                return f"the {HEAD_OF[use]} head of this model predicts a number, not classes"
            if use in heads:
                model.head(heads[use])
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
        return Item(
            image=torch.zeros(3, side, side, dtype=torch.uint8), ids=(processor.bos_token_id, processor.eos_token_id)
        )


class Service:
    """A model behind a queue, and perhaps a second one that answers questions.

    Attributes:
        main: The model.
        answering: What answers questions: another model, or the same.
        searcher: The model together with an index, if there is one.
        config: How it is served.
        started: When, in seconds since 1970.
        metrics: Of all requests.
    """

    def __init__(
        self,
        predictor: Predictor,
        config: ServeConfig,
        searcher: Searcher | None = None,
        answering: Predictor | None = None,
    ) -> None:
        self.searcher, self.config, self.started = searcher, config, int(time.time())
        self.metrics = Metrics()
        remote = RemoteImages(config.allow_host, max_bytes=config.max_body * MIB, timeout=config.timeout)

        pixels = config.max_pixels * 1_000_000
        decoders = Decoders(
            max_pixels=pixels, memory=MEMORY_PER_PIXEL * pixels + 3 * config.max_body * MIB + _DECODER_MEMORY
        )

        def served(name: str | None, predictor: Predictor) -> ServedModel:
            inputs = Inputs(predictor.processor, decoders, remote=remote if config.allow_host else None)
            return ServedModel(name=name or predictor.source, predictor=predictor, inputs=inputs)

        self.main = served(config.name, predictor)
        self.answering = self.main if answering is None else served(None, answering)
        self._batcher: Batcher[QueueItem, Any] | None = None
        self._warm = False

    @property
    def models(self) -> list[ServedModel]:
        """The model, and the second one if there is one."""
        return [self.main] if self.answering is self.main else [self.main, self.answering]

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.main.name

    @property
    def index(self) -> Index:
        """The index; routes that need it exist only with one."""
        assert self.searcher is not None
        return self.searcher.index

    @property
    def max_batch(self) -> int:
        """Most items computed at once."""
        return self.config.max_batch or (16 if self.main.predictor.device.type == "cpu" else 64)

    @property
    def inputs(self) -> Inputs:
        """Prepares images and texts for the model."""
        return self.main.inputs

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs the queue during the block; at its end, admitted items are finished."""
        self._batcher = Batcher(
            self._compute,
            max_batch=self.max_batch,
            queue=self.config.queue,
            metrics=self.metrics,
        )
        await asyncio.gather(
            self._batcher.submit(self._first_items()),
            asyncio.to_thread(lambda: [model.predictor.fingerprint for model in self.models]),  # slow, and is kept
            asyncio.to_thread(self.inputs.warm),
        )
        self.metrics.describe(self.name, self.main.predictor.fingerprint)
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
        """The queue."""
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
        if use is not None:
            self.check_use(use)
        expected = (self.main if use is None else self.model_for(use)).name
        if name not in (None, expected):
            message = f"model is {name!r}; this server has {expected!r}" + (" for this" if len(self.models) > 1 else "")
            raise ApiError(404, message, param="model", code="model_not_found")
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
        """Returns the uses of a model."""
        return [use for use in get_args(Use) if self.model_for(use) is model and model.lacking(use) is None]

    def check_use(self, use: Use) -> None:
        """Checks that there is a model with the head for a use."""
        if lacking := self.model_for(use).lacking(use):
            raise ApiError(400, lacking, code="unsupported_by_model")

    async def pairs(
        self, use: PairUse, given: PairInputs, *, top: int = 1, truncate: bool = False
    ) -> tuple[list[Any], int]:
        """Computes pairs of images and texts."""
        model, (image_param, text_param) = self.model_for(use), given.params
        decoded = iter(await model.inputs.images([image for image in given.images if image is not None], image_param))
        blank = model.predictor.processor.blank_image()
        images = [blank if image is None else next(decoded) for image in given.images]
        images_2 = await model.inputs.images(given.images_2, "images_2")
        texts = await model.inputs.texts(given.texts, text_param, truncate=truncate)
        if use == "fill-mask":
            self._check_masks(texts, text_param, top)
        items = [
            Item(
                kind=cast(Kind, use.replace("-", "_")),
                image=images[image].pixels,
                image_2=images_2[image].pixels if images_2 else None,
                ids=texts[text],
                top=top,
            )
            for image, text in given.pairs()
        ]
        return await self.batcher.submit(items), model.tokens([*images, *images_2], texts)

    async def attention(self, image: Resized, ids: Tokens) -> Attention:
        """Computes the cross-attention of the words of a text over an image, as `bridgetower.explain` does."""
        try:
            words_of(self.main.predictor.processor, ids)
        except ValueError as error:
            raise ApiError(400, str(error), param="text") from error
        (attention,) = await self.batcher.submit([AttentionItem(image=image.pixels, ids=ids)])
        return cast(Attention, attention)

    def _check_masks(self, texts: Sequence[Tokens], param: str, top: int) -> None:
        masks = [ids.count(self.main.predictor.processor.mask_token_id) for ids in texts]
        if 0 in masks:
            mask, number = self.main.predictor.processor.mask_token, masks.index(0)
            raise ApiError(400, f"{param}: no mask in text {number}; put {mask} where a word is missing", param=param)
        if sum(masks) * top > (most := MOST_TOP * self.config.max_items):
            message = f"{param}: {sum(masks)} masks with {top} words each, the limit is {most} words; ask for fewer"
            raise ApiError(413, message, param=param)

    def _compute(self, items: Sequence[QueueItem]) -> list[Outcome]:
        def predictor_of(item: QueueItem) -> Predictor:
            return self.model_for(item.kind).predictor if isinstance(item, Item) else self.main.predictor

        return compute(predictor_of, items)

    def _first_items(self) -> list[QueueItem]:
        """Items that are computed before the first request."""
        answering = [] if self.answering is self.main else [replace(self.answering.pair(), kind="answer")]
        return [self.main.pair(), *answering]


async def _served(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Served = Annotated[Service, Depends(_served)]
"""The service, as an argument of a route."""
