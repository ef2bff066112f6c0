"""A loss that is a mean over rows, what trains it, and what watches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import asked
import shapes
from bridgetower.data.batch import CaptionBatch
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.objectives.losses import Losses
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.run import fit
from bridgetower.training.setup import TrainContext

Build, StopAt = Callable[..., TrainContext], Callable[..., None]
Caplog, Patch = pytest.LogCaptureFixture, pytest.MonkeyPatch
Finished, Runs = tuple[Path, dict[str, float]], dict[str, RunConfig]
KINDS = ("ranking", *asked.KINDS)
PLAIN = shapes.MODEL.override({"text.dropout": 0.0, "fusion.dropout": 0.0})


class RowTask(nn.Module):
    """A loss that is a mean over rows, so that accumulated micro-batches are exactly one large batch."""

    def __init__(self, model: BridgeTower) -> None:
        super().__init__()
        self.model, self.progress = model, 0.0
        self.seen: list[float] = []

    def forward(self, batch: CaptionBatch) -> Losses:
        self.seen.append(self.progress)
        pooled = self.model(batch.pixel_values, batch.input_ids, batch.attention_mask, outputs="pooled").pooled
        loss = F.mse_loss(self.model.itm_logits(pooled)[:, 1], batch.image_index % 30 / 10)
        return Losses.weigh({"row": loss}, {"row": 1.0})


def run(parts: TrainContext, out: Path, **options: Any) -> Tensor:
    """Trains and returns all weights as one vector."""
    out.mkdir(exist_ok=True)
    fit(parts, out, **{"resume": False, "progress": False} | options)
    return weights(parts.model)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


@contextmanager
def recorded_gradients(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects all gradients as one vector before each optimiser step."""
    seen: list[Tensor] = []

    def record(optimizer: torch.optim.Optimizer, arguments: Any, options: Any) -> None:
        seen.append(torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]))

    hook = register_optimizer_step_pre_hook(record)
    try:
        yield seen
    finally:
        hook.remove()
