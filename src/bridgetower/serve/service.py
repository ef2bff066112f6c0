"""What the routes ask for: one model or two, and the queue before them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

from fastapi import Depends, Request

from bridgetower.analysis.attention import Attention, words_of
from bridgetower.inference import HEAD_OF, Item, Kind, Tokens
from bridgetower.predictor import Predictor
from bridgetower.processor import Resized
from bridgetower.serve.batching import Batcher
from bridgetower.serve.config import MOST_TOP, ServeConfig
from bridgetower.serve.errors import ApiError
from bridgetower.serve.forward import AttentionItem, Outcome, QueueItem, compute
from bridgetower.serve.inputs import Inputs
from bridgetower.serve.metrics import Metrics
from bridgetower.serve.remote import RemotePictures
from bridgetower.serve.served_model import ServedModel, Use

if TYPE_CHECKING:
    from bridgetower.search.index import Index
    from bridgetower.search.searcher import Searcher

MIB = 2**20

_MEGA = 1_000_000


class Service:
    """A model behind a queue, and perhaps a second one that answers questions.

    Attributes:
        main: The model.
        answering: What answers questions: another model, or the same.
        searcher: The model together with an index, if there is one.
        config: How it is served.
        started: When, in seconds since 1970.
        metrics: Figures about all requests.
    """

    def __init__(
        self,
        predictor: Predictor,
        config: ServeConfig,
        searcher: Searcher | None = None,
        answering: Predictor | None = None,
    ) -> None:
        """Computes nothing yet.

        Args:
            predictor: The model.
            config: How it is served.
            searcher: The model together with an index.
            answering: Answers questions; None: the model itself, if it can.
        """
        self.searcher, self.config, self.started = searcher, config, int(time.time())
        self.metrics = Metrics()
        remote = RemotePictures(config.allow_host, max_bytes=config.max_body * MIB, timeout=config.timeout)

        def served(name: str | None, predictor: Predictor) -> ServedModel:
            allowed = remote if config.allow_host else None
            inputs = Inputs(predictor.processor, max_pixels=self.max_pixels, remote=allowed)
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
        """What is searched; routes that need it are there only with one."""
        assert self.searcher is not None
        return self.searcher.index

    @property
    def max_pixels(self) -> int:
        """Most pixels of an image."""
        return self.config.max_pixels * _MEGA

    @property
    def predictor(self) -> Predictor:
        """The model."""
        return self.main.predictor

    @property
    def inputs(self) -> Inputs:
        """Prepares pictures and texts for the model."""
        return self.main.inputs

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Computes while the block runs; at its end, what was taken in is finished."""
        self._batcher = Batcher(
            self._compute,
            max_batch=self.config.max_batch or (16 if self.predictor.device.type == "cpu" else 64),
            queue=self.config.queue,
            observe=self.metrics.observe_batch,
        )
        await asyncio.gather(
            self._batcher.submit(self._first_items()),
            asyncio.to_thread(lambda: [model.predictor.fingerprint for model in self.models]),  # slow, and is kept
        )
        self.metrics.watch(self.name, self.predictor.fingerprint, lambda: self.batcher.admitted)
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
    def admission(self, count: int, param: str, name: str | None, model: ServedModel | None = None) -> Iterator[None]:
        """Keeps room for the items of a request.

        Args:
            count: Pictures, texts or pairs.
            param: Field of the request that they come from.
            name: Of the model that the request is for.
            model: That computes them; None: the main one.

        Raises:
            ApiError: There are too many, or the request is for another model.
            QueueFullError: There is no room now.
        """
        expected = (model or self.main).name
        if name not in (None, expected):
            message = f"model is {name!r}; this server has {expected!r}" + (" for this" if len(self.models) > 1 else "")
            raise ApiError(404, message, param="model", code="model_not_found")
        if count > self.config.max_items:
            message = f"{param}: {count} items, the limit is {self.config.max_items}; send several requests"
            raise ApiError(413, message, param=param)
        with self.batcher.admission(count):
            yield

    def model_for(self, use: Use) -> ServedModel:
        """Returns the model that serves a use; what one is fine-tuned for, the second one does if it can."""
        return self.answering if use in HEAD_OF and self.answering.lacking(use) is None else self.main

    def uses(self, model: ServedModel) -> list[Use]:
        """Returns what a model is used for."""
        return [use for use in get_args(Use) if self.model_for(use) is model and model.lacking(use) is None]

    def check_use(self, use: Use) -> None:
        """Checks that there is a model with a head for something.

        Raises:
            ApiError: There is none.
        """
        if lacking := self.model_for(use).lacking(use):
            raise ApiError(400, lacking, code="unsupported_by_model")

    async def pairs(
        self,
        kind: Literal["match", "answer", "entail", "reason", "classify", "fill_mask"],
        images: Sequence[str | None],
        texts: Sequence[str],
        pairs: Sequence[tuple[int, int]],
        *,
        images_2: Sequence[str] = (),
        params: tuple[str, str] = ("images", "texts"),
        top: int = 1,
        truncate: bool = False,
    ) -> tuple[list[Any], int]:
        """Computes pairs of pictures and texts.

        Args:
            kind: What of them.
            images: As requests hold them; None in the place of an image is none.
            texts: Likewise; an empty one is none.
            pairs: Numbers of picture and text.
            images_2: Second images of `reason`, one beside each of the first.
            params: Fields that pictures and texts come from.
            top: Answers or judgements, or words per mask.
            truncate: Cut texts that are too long.

        Returns:
            What `forward.compute` returns of each pair, and the tokens that were read.

        Raises:
            ApiError: An input cannot be used.
        """
        model = self._model_of(kind)
        decoded = iter(await model.inputs.images([image for image in images if image is not None], params[0]))
        blank = model.predictor.processor.blank_image()
        pictures = [blank if image is None else next(decoded) for image in images]
        others = await model.inputs.images(images_2, "images_2")
        words = await model.inputs.texts(texts, params[1], truncate=truncate)
        if kind == "fill_mask":
            self._check_masks(words, params[1], top)
        items = [
            Item(
                kind=kind,
                image=pictures[image].pixels,
                image_2=others[image].pixels if others else None,
                ids=words[text],
                top=top,
            )
            for image, text in pairs
        ]
        return await self.batcher.submit(items), model.tokens([*pictures, *others], words)

    async def attention(self, image: Resized, ids: Tokens) -> Attention:
        """Looks where the words of a text look in an image, as `analysis.attention.explain` does.

        Raises:
            ApiError: The text has no word.
        """
        try:
            words_of(self.predictor.processor, ids)
        except ValueError as error:
            raise ApiError(400, str(error), param="text") from error
        (attention,) = await self.batcher.submit([AttentionItem(image=image.pixels, ids=ids)])
        return cast(Attention, attention)

    def tokens(self, images: Sequence[Resized], texts: Sequence[Tokens]) -> int:
        """Returns how many positions the model's towers read."""
        return self.main.tokens(images, texts)

    def _check_masks(self, texts: Sequence[Tokens], param: str, top: int) -> None:
        masks = [ids.count(self.predictor.processor.mask_token_id) for ids in texts]
        if 0 in masks:
            mask, number = self.predictor.processor.mask_token, masks.index(0)
            raise ApiError(400, f"{param}: no mask in text {number}; put {mask} where a word is missing", param=param)
        if sum(masks) * top > (most := MOST_TOP * self.config.max_items):
            message = f"{param}: {sum(masks)} masks with {top} words each, the limit is {most} words; ask for fewer"
            raise ApiError(413, message, param=param)

    def _model_of(self, kind: Kind) -> ServedModel:
        return self.model_for(cast(Use, kind)) if kind in HEAD_OF else self.main

    def _compute(self, items: Sequence[QueueItem]) -> list[Outcome]:
        def predictor_of(item: QueueItem) -> Predictor:
            return self._model_of(item.kind).predictor if isinstance(item, Item) else self.predictor

        return compute(predictor_of, items)

    def _first_items(self) -> list[QueueItem]:
        """What is computed before the first request."""
        answering = [] if self.answering is self.main else [replace(self.answering.pair(), kind="answer")]
        return [self.main.pair(), *answering]


async def _served(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Served = Annotated[Service, Depends(_served)]
"""The service, as an argument of a route."""
