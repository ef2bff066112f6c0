"""Fine-tuning as BEiT and CLIP do it: lower learning rates for lower layers, and a moving average of the weights (EMA).

bridgetower train RECIPE --init MODEL --extensions examples/layered.py:LAYERED --optimizer.rule by_layer …

Validation, `best/` and `last/` have the average; --resume continues it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from bridgetower import Extensions
from bridgetower.training.setup import Callback, TrainContext


def by_layer(
    groups: Sequence[Mapping[str, Any]], config: Any, top: int = 11, decay: float = 0.8
) -> Optimizer:
    """AdamW; each layer of a tower has `decay` times the rate of the next one, embeddings that of layer 0."""
    parts = []
    for group in groups:
        for name, weight in zip(group["names"], group["params"], strict=True):
            found = re.match(r"(?:vision|text)\.(?:layers\.(\d+)|\w*embedding)", name)
            depth = top - int(found[1] or 0) if found else 0
            parts.append(
                {**group, "params": [weight], "names": [name], "lr": group["lr"] * decay**depth}
            )
    return torch.optim.AdamW(parts, betas=config.betas, eps=config.eps)


class Averaged(Callback):
    """Keeps the average beside the state of the optimiser, which the states of a run hold."""

    def __init__(self, decay: float = 0.999) -> None:
        self.decay = decay

    def after_step(self, context: TrainContext, optimizer: Optimizer, step: int) -> None:
        """Moves the average, which begins with the weights after the first step."""
        for weight, state in optimizer.state.items():
            if "mean" not in state:
                state["mean"] = weight.detach().clone()
            state["mean"].lerp_(weight.detach(), 1 - self.decay)

    @contextmanager
    def evaluating(self, context: TrainContext, optimizer: Optimizer) -> Iterator[None]:
        """Puts the average into the model for a validation and for what is saved of it."""
        self.swap(optimizer)
        yield
        self.swap(optimizer)

    @torch.no_grad()
    def swap(self, optimizer: Optimizer) -> None:
        """Exchanges weights and average."""
        for weight, state in optimizer.state.items():
            kept = weight.clone()
            weight.copy_(state["mean"])
            state["mean"].copy_(kept)


LAYERED = Extensions(optimizers={"by_layer": by_layer}, callbacks=(Averaged(),))
