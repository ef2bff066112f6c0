"""What the routes ask for: a served model, its queue and what prepares inputs for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Annotated

import torch
from fastapi import Depends, Request

from bridgetower.predictor import Predictor
from bridgetower.processor import Resized
from bridgetower.serve.batching import Batcher
from bridgetower.serve.config import ServeConfig
from bridgetower.serve.errors import ApiError
from bridgetower.serve.forward import Item, Outcome, Tokens, compute
from bridgetower.serve.inputs import Inputs

_MEGA = 1_000_000


class Service:
    """A model behind a queue.

    Attributes:
        predictor: The model.
        config: How it is served.
        name: What clients call it.
        started: When, in seconds since 1970.
        inputs: Prepares pictures and texts.
        ready: Whether it has computed anything yet and still does.
    """

    def __init__(self, predictor: Predictor, config: ServeConfig) -> None:
        self.predictor, self.config = predictor, config
        self.name, self.started = config.name or predictor.source, int(time.time())
        self.inputs = Inputs(predictor.processor, max_pixels=config.max_pixels * _MEGA)
        self._batcher: Batcher[Item, Outcome] | None = None
        self._warm = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Computes while the block runs; at its end, what was taken in is finished."""
        self._batcher = Batcher(
            partial(compute, self.predictor), max_batch=self.config.max_batch, queue=self.config.queue
        )
        await asyncio.gather(
            self._batcher.submit(self._first_items()),
            asyncio.to_thread(lambda: self.predictor.fingerprint),  # takes a while for large models, and is kept
        )
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
    def batcher(self) -> Batcher[Item, Outcome]:
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

    def tokens(self, images: Sequence[Resized], texts: Sequence[Tokens]) -> int:
        """Returns how many positions the towers read: those of texts, and a patch or a CLS each of pictures."""
        vision = self.predictor.model.config.vision
        per_image = (vision.image_size // vision.patch_size) ** 2 + 1
        return len(images) * per_image + sum(map(len, texts))

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
