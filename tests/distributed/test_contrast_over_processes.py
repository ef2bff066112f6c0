"""The contrastive loss over processes and their micro-batches against one graph, of towers and of fused pairs."""

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
KINDS = {"tower": tiny.changed(heads__itc_dropout=0.3), "fused": tiny.changed(heads__itc="fused")}
NO_DROPOUT = {"text.dropout": 0.0, "fusion.dropout": 0.0, "heads.itc_dropout": 0.0}
ITC = PretrainingConfig(phases=(Phase(mlm=0, itm=0, itc=2),))

Gradients = dict[str, Tensor]


def rows_of(start: int, stop: int) -> CaptionBatch:
    batch = tiny.caption_batch(INDEX, LENGTHS, tiny.CONFIG)
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


def at_once(kind: str) -> tuple[Tensor, Gradients]:
    """A step of one micro-batch per process."""
    share = len(INDEX) // world_size()
    task = PretrainingTask(tiny.build(KINDS[kind].override(NO_DROPOUT)).train(), ITC)
    parallel = DistributedDataParallel(task, find_unused_parameters=True)
    loss = parallel(rows_of(rank() * share, (rank() + 1) * share)).total
    loss.backward()
    return loss.detach(), gradients(task)


def in_parts(kind: str) -> tuple[Tensor, Gradients]:
    """A step of two micro-batches per process, with dropout, contrasted over all of them."""
    task, parts = PretrainingTask(tiny.build(KINDS[kind]).train(), ITC), micro_batches(rank(), world_size())
    contrasts = contrast_of_step(task, parts, lambda micro: seed(rank(), micro))
    parallel = DistributedDataParallel(task, find_unused_parameters=True)
    losses = []
    for micro, (batch, contrast) in enumerate(zip(parts, contrasts, strict=True)):
        seed(rank(), micro)
        with nullcontext() if micro else parallel.no_sync():
            losses.append(parallel(batch, contrast).total)
            (losses[-1] / 2).backward()
    return torch.stack(losses).mean().detach(), gradients(task)


def everything() -> dict[tuple[str, bool], Any]:
    return {(kind, whole): at_once(kind) if whole else in_parts(kind) for kind in KINDS for whole in (True, False)}


def alone(kind: str, whole: bool, processes: int) -> tuple[Tensor, Gradients]:
    """The same with one graph over everything."""
    config = KINDS[kind].override(NO_DROPOUT) if whole else KINDS[kind]
    task = PretrainingTask(tiny.build(config).train(), ITC)
    features = []
    for process in range(processes):
        for micro, batch in enumerate(micro_batches(process, processes)):
            seed(process, micro)
            features.append(task.features(batch))
    embeds = [torch.cat(parts) for parts in zip(*(part.embeds for part in features), strict=True)]
    loss = 2 * itc_loss(embeds, torch.tensor(INDEX), task.model.head("itc").logit_scale())
    loss.backward()
    return loss.detach(), gradients(task)


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_are_one(processes: int) -> None:
    results = run_on_ranks(processes, everything)
    for key in results[0]:
        loss, expected = alone(*key, processes)
        mean = torch.stack([found[key][0] for found in results]).mean()
        torch.testing.assert_close(mean, loss, atol=5e-6, rtol=2e-5)
        assert expected["itc_head.text.weight"].abs().max() > 1e-2
        assert key[0] == "tower" or expected["fusion.text_layers.0.mlp.up.weight"].abs().max() > 0
        for found in results:
            assert found[key][1].keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(found[key][1][name], gradient, atol=2e-5, rtol=1e-4, msg=f"{key}: {name}")
