"""Predictions of a task for every example of a set, shared out over the processes of a distributed run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridgetower.data.batch import BatchDataset, BatchKey
from bridgetower.distributed import gather_by_id, rank, world_size
from bridgetower.evaluation.config import DEFAULTS, EvaluationOptions
from bridgetower.processor import load_items
from bridgetower.progress import counted


class Predictions(NamedTuple):
    """The likeliest class of every example, in order, and the probability that the task gives it."""

    classes: Int[Tensor, " n"]
    probabilities: Float[Tensor, " n"]


def predict_classes(
    task: nn.Module, examples: BatchDataset, *, batch_size: int, options: EvaluationOptions = DEFAULTS
) -> Predictions:
    found = predict(task, examples, lambda out: out.max(dim=1)[::-1], batch_size=batch_size, options=options)
    return Predictions(*found)


@torch.inference_mode()
def predict(
    task: nn.Module,
    examples: BatchDataset,
    read: Callable[[Tensor], tuple[Tensor, ...]],
    *,
    batch_size: int,
    options: EvaluationOptions = DEFAULTS,
) -> tuple[Tensor, ...]:
    """Predicts every example; each process predicts its share and gets all."""
    own = range(rank() % len(examples), len(examples), world_size())  # of fewer examples than processes, one twice
    keys = [BatchKey(tuple(own[start : start + batch_size]), 0) for start in range(0, len(own), batch_size)]
    device = next(task.parameters()).device
    loader: Iterable[Any] = load_items(examples.__getitem__, keys, num_workers=options.num_workers, device=device)
    loader = counted(loader, "predicting batches", shown=options.progress and rank() == 0, total=len(keys))
    parts = [tuple(part.cpu() for part in read(task.predict(batch.to(device)))) for batch in loader]  # type: ignore[operator]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return gather_by_id(torch.tensor(own), *columns)[1:]
