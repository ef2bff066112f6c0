"""What the routes ask for: a served model, its queue and what prepares inputs for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import torch
from fastapi import Depends, Request

from bridgetower.analysis.attention import Explanation, words_of
from bridgetower.predictor import Predictor
from bridgetower.processor import Resized
from bridgetower.serve.batching import Batcher
from bridgetower.serve.config import ServeConfig
from bridgetower.serve.errors import ApiError
from bridgetower.serve.forward import Item, Tokens, compute
from bridgetower.serve.inputs import Inputs
from bridgetower.serve.metrics import Metrics
from bridgetower.serve.remote import RemotePictures

if TYPE_CHECKING:
    from bridgetower.search.searcher import Searcher

Use = Literal["embeddings", "match", "fill-mask", "answer"]

_MEGA, _MIB = 1_000_000, 2**20


class Service:
    """A model behind a queue.

    Attributes:
        predictor: The model.
        searcher: The model together with an index, if there is one.
        config: How it is served.
        name: What clients call it.
        started: When, in seconds since 1970.
        metrics: Figures about all requests.
        inputs: Prepares pictures and texts.
    """

    def __init__(self, predictor: Predictor, config: ServeConfig, searcher: Searcher | None = None) -> None:
        self.predictor, self.searcher, self.config = predictor, searcher, config
        self.name, self.started = config.name or predictor.source, int(time.time())
        self.metrics = Metrics()
        remote = RemotePictures(config.allow_host, max_bytes=config.max_body * _MIB, timeout=config.timeout)
        self.inputs = Inputs(
            predictor.processor, max_pixels=config.max_pixels * _MEGA, remote=remote if config.allow_host else None
        )
        self._batcher: Batcher[Item, Any] | None = None
        self._warm = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Computes while the block runs; at its end, what was taken in is finished."""
        self._batcher = Batcher(
            partial(compute, self.predictor),
            max_batch=self.config.max_batch or (16 if self.predictor.device.type == "cpu" else 64),
            queue=self.config.queue,
            observe=self.metrics.observe_batch,
        )
        await asyncio.gather(
            self._batcher.submit(self._first_items()),
            asyncio.to_thread(lambda: self.predictor.fingerprint),  # takes a while for large models, and is kept
        )
        self.metrics.watch(self.name, self.predictor.fingerprint, lambda: self.batcher.admitted)
        self._warm = True
        try:
            yield
        finally:
            self._warm = False
            await self._batcher.close()
            self.inputs.close()

    @property
    def ready(self) -> bool:
        """Whether it has computed something and still can."""
        return self._warm and self.batcher.alive

    @property
    def batcher(self) -> Batcher[Item, Any]:
        """The queue."""
        if self._batcher is None:
            raise RuntimeError("the service does not run; use it within running()")
        return self._batcher

    @contextmanager
    def admission(self, count: int, param: str, model: str | None) -> Iterator[None]:
        """Keeps room for the items of a request.

        Args:
            count: Pictures, texts or pairs.
            param: Field of the request that they come from.
            model: That the request names.

        Raises:
            ApiError: There are too many, or the request is for another model.
            QueueFullError: There is no room now.
        """
        self.check_name(model)
        if count > self.config.max_items:
            message = f"{param}: {count} items, the limit is {self.config.max_items}; send several requests"
            raise ApiError(413, message, param=param)
        with self.batcher.admission(count):
            yield

    def check_name(self, model: str | None) -> None:
        """Checks that a request is for this model.

        Raises:
            ApiError: It is not.
        """
        if model not in (None, self.name):
            message = f"model is {model!r}; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def uses(self) -> list[Use]:
        """Returns what the model has heads for."""
        return [use for use in get_args(Use) if self._lacking(use) is None]

    def check_use(self, use: Use) -> None:
        """Checks that the model has a head for something.

        Raises:
            ApiError: It has none.
        """
        if lacking := self._lacking(use):
            raise ApiError(400, lacking, code="unsupported_by_model")

    async def pairs(
        self,
        kind: Literal["match", "answer", "fill_mask"],
        images: Sequence[str],
        texts: Sequence[str],
        pairs: Sequence[tuple[int, int]],
        *,
        params: tuple[str, str] = ("images", "texts"),
        top: int = 1,
        truncate: bool = False,
    ) -> tuple[list[Any], int]:
        """Computes pairs of pictures and texts.

        Args:
            kind: What of them.
            images: As requests hold them.
            texts: Likewise.
            pairs: Numbers of picture and text.
            params: Fields that pictures and texts come from.
            top: Answers, or words per mask.
            truncate: Cut texts that are too long.

        Returns:
            What `forward.compute` has of each pair, and the tokens that were read.

        Raises:
            ApiError: An input cannot be used.
        """
        pictures = await self.inputs.images(images, params[0])
        words = await self.inputs.texts(texts, params[1], truncate=truncate)
        if kind == "fill_mask":
            self._check_masks(words, params[1])
        items = [Item(kind=kind, image=pictures[image], ids=words[text], top=top) for image, text in pairs]
        return await self.batcher.submit(items), self.tokens(pictures, words)

    async def explanation(self, image: str, text: str) -> Explanation:
        """Looks where the words of a text look in a picture, as `analysis.attention.explain` does.

        Args:
            image: As requests hold it.
            text: What is said of it.

        Raises:
            ApiError: An input cannot be used.
        """
        (picture,) = await self.inputs.images([image], "image")
        (ids,) = await self.inputs.texts([text], "text", truncate=False)
        try:
            words_of(self.predictor.processor, ids)
        except ValueError as error:
            raise ApiError(400, str(error), param="text") from error
        (attention,) = await self.batcher.submit([Item(kind="attention", image=picture, ids=ids)])
        view = await asyncio.to_thread(self.inputs.view, image)
        return Explanation(text=text, view=view, **vars(attention))

    def tokens(self, images: Sequence[Resized], texts: Sequence[Tokens]) -> int:
        """Returns how many positions the towers read: those of texts, and a patch or a CLS each of pictures."""
        return len(images) * self.predictor.model.config.vision.num_tokens + sum(map(len, texts))

    def _check_masks(self, texts: Sequence[Tokens], param: str) -> None:
        for number, ids in enumerate(texts):
            if self.predictor.processor.mask_token_id not in ids:
                mask = self.predictor.processor.mask_token
                raise ApiError(
                    400, f"{param}: no mask in text {number}; put {mask} where a word is missing", param=param
                )

    def _lacking(self, use: Use) -> str | None:
        """What a model lacks for a use."""
        model = self.predictor.model
        heads: dict[Use, Callable[[], object]] = {
            "embeddings": model.contrastive_head,
            "match": model.matching_head,
            "fill-mask": model.masked_language_head,
            "answer": lambda: self.predictor.class_names("vqa"),
        }
        try:
            heads[use]()
        except ValueError as error:
            return str(error)
        return None

    def _first_items(self) -> list[Item]:
        """What a model computes before its first request: a pair, which runs all of it but the heads."""
        side = self.predictor.processor.config.image_size
        image = Resized(pixels=torch.zeros(3, side, side, dtype=torch.uint8), width=side, height=side)
        processor = self.predictor.processor
        return [Item(image=image, ids=(processor.bos_token_id, processor.eos_token_id))]


async def _served(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Served = Annotated[Service, Depends(_served)]
"""The service, as an argument of a route."""
