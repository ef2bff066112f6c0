"""The contrastive loss of images, texts and both fused: over processes and their micro-batches against one graph."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import tiny
from bridgetower.data.batch import CaptionBatch
from bridgetower.distributed import rank, world_size
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.losses import itc_loss
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.training.step import contrast_of_step

INDEX = (0, 1, 2, 2, 3, 0, 4, 5)  # image 0 is in several processes, image 2 twice in one
LENGTHS = (7, 3, 5, 4, 4, 2, 6, 3)
DROPPING = tiny.changed(heads__itc="fused")
PLAIN = DROPPING.override({"text.dropout": 0.0, "fusion.dropout": 0.0})
ITC = PretrainingConfig(phases=(Phase(mlm=0, itm=0, itc=2),))

Gradients = dict[str, Tensor]


def rows_of(start: int, stop: int) -> CaptionBatch:
    batch = tiny.caption_batch(INDEX, LENGTHS, DROPPING)
    tensors = {name: value[start:stop] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **tensors, ids=batch.ids[start:stop])


def micro_batches(process: int, processes: int) -> list[CaptionBatch]:
    """A process's share of the batch in two parts."""
    half = len(INDEX) // processes // 2
    return [rows_of(start, start + half) for start in (2 * process * half, (2 * process + 1) * half)]


def seed(process: int, micro: int) -> None:
    torch.manual_seed(10 * process + micro)


def gradients(task: PretrainingTask) -> Gradients:
    return {name: value.grad.clone() for name, value in task.model.named_parameters() if value.grad is not None}


def at_once() -> tuple[Tensor, Gradients]:
    """A step of one micro-batch per process."""
    share = len(INDEX) // world_size()
    task = PretrainingTask(tiny.build(PLAIN).train(), ITC)
    parallel = DistributedDataParallel(task, find_unused_parameters=True)
    loss = parallel(rows_of(rank() * share, (rank() + 1) * share)).total
    loss.backward()
    return loss.detach(), gradients(task)


def in_parts() -> tuple[Tensor, Gradients]:
    """A step of two micro-batches per process, with dropout, contrasted over all of them."""
    task, parts = PretrainingTask(tiny.build(DROPPING).train(), ITC), micro_batches(rank(), world_size())
    contrasts = contrast_of_step(task, parts, lambda micro: seed(rank(), micro))
    parallel = DistributedDataParallel(task, find_unused_parameters=True)
    losses = []
    for micro, (batch, contrast) in enumerate(zip(parts, contrasts, strict=True)):
        seed(rank(), micro)
        with nullcontext() if micro else parallel.no_sync():
            losses.append(parallel(batch, contrast).total)
            (losses[-1] / 2).backward()
    return torch.stack(losses).mean().detach(), gradients(task)


def both() -> dict[str, Any]:
    return {"at once": at_once(), "in parts": in_parts()}


def alone(kind: str, processes: int) -> tuple[Tensor, Gradients]:
    """The same with one graph over everything."""
    task = PretrainingTask(tiny.build(PLAIN if kind == "at once" else DROPPING).train(), ITC)
    features = []
    for process in range(processes):
        for micro, batch in enumerate(micro_batches(process, processes)):
            seed(process, micro)
            features.append(task.features(batch))
    embeds = [torch.cat(parts) for parts in zip(*(part.embeds for part in features), strict=True)]
    loss = 2 * itc_loss(embeds, torch.tensor(INDEX), task.model.contrastive_head().logit_scale())
    loss.backward()
    return loss.detach(), gradients(task)


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_are_one(processes: int) -> None:
    results = run_on_ranks(processes, both)
    for kind in ("at once", "in parts"):
        loss, expected = alone(kind, processes)
        torch.testing.assert_close(
            torch.stack([found[kind][0] for found in results]).mean(), loss, atol=5e-6, rtol=2e-5
        )
        assert {"itc_head.pooled.weight", "fusion.text_layers.0.mlp.up.weight"} < expected.keys()
        assert expected["itc_head.pooled.weight"].abs().max() > 1e-2
        for found in results:
            assert found[kind][1].keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(found[kind][1][name], gradient, atol=2e-5, rtol=1e-4, msg=f"{kind}: {name}")
