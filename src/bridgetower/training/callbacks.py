"""Custom code that runs along with the training loop, such as a running mean of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch.optim import Optimizer

if TYPE_CHECKING:
    from bridgetower.training.setup import TrainContext


class Callback:
    """Override what is needed, and give an instance to `Extensions.callbacks`.

    Tensors in `optimizer.state[parameter]` are saved and restored with the run.
    """

    def after_step(self, context: TrainContext, optimizer: Optimizer, step: int) -> None:
        """Is called after each step, counted from 1, that changed the weights."""

    @contextmanager
    def evaluating(self, context: TrainContext, optimizer: Optimizer) -> Iterator[None]:
        """Surrounds each evaluation and the writing of `best/` and `last/`, such as to swap the weights."""
        yield
