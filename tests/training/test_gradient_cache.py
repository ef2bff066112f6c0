"""Steps whose contrast spans all micro-batches, against one graph over everything, dropout included."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import shapes
import tiny
from bridgetower.data.batch import CaptionBatch
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.losses import itc_loss
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.training.step import contrast_of_step, encodes_twice

CONTRAST = Phase(mlm=0, itm=0, itc=2)
EVERYTHING = Phase(mlm=0.5, itm=2, itc=1)
BATCHES = [
    tiny.caption_batch((0, 1), (5, 3), seed=3),
    tiny.caption_batch((2, 0), (4, 4), seed=4),
    tiny.caption_batch((3, 4), (7, 2), seed=5),
]


HEADS = {"tower": {"heads__itc_dropout": 0.3}, "fused": {"heads__itc": "fused"}}


def make_task(phase: Phase, kind: str) -> PretrainingTask:
    model = tiny.build(tiny.changed(**HEADS[kind])).train()
    return PretrainingTask(model, PretrainingConfig(phases=(phase,)))


def seed(number: int) -> None:
    torch.manual_seed(100 + number)


def gradients(task: PretrainingTask) -> dict[str, Tensor]:
    return {name: value.grad for name, value in task.model.named_parameters() if value.grad is not None}


def in_parts(
    phase: Phase,
    kind: str = "tower",
    batches: Sequence[CaptionBatch] = BATCHES,
    again: Callable[[int], None] = seed,
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Losses of each micro-batch and the gradients of their mean."""
    task = make_task(phase, kind)
    contrasts = contrast_of_step(task, batches, seed)
    parts = []
    for number, (batch, contrast) in enumerate(zip(batches, contrasts, strict=True)):
        again(number)
        losses = task(batch, contrast)
        (losses.total / len(batches)).backward()
        parts.append({name: loss.detach() for name, loss in losses.parts.items()})
    return parts, gradients(task)


def as_a_whole(phase: Phase, kind: str = "tower") -> tuple[Tensor, dict[str, Tensor]]:
    """ITC of all batches with one graph, and the gradients of it and of the other objectives' means."""
    task, features = make_task(phase, kind), []
    for number, batch in enumerate(BATCHES):
        seed(number)
        features.append(task.features(batch))
    embeds = [torch.cat(parts) for parts in zip(*(part.embeds for part in features), strict=True)]
    index = torch.cat([batch.image_index for batch in BATCHES])
    loss = itc_loss(embeds, index, task.model.head("itc").logit_scale())
    (phase.itc * loss).backward()
    if phase.itm:
        for number, batch in enumerate(BATCHES):
            seed(number)
            parts = task(batch).parts  # ITC too, as it draws dropout before the others
            ((phase.mlm * parts["mlm"] + phase.itm * parts["itm"]) / len(BATCHES)).backward()
    return loss.detach(), gradients(task)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference, of large gradients as a share of their largest value."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max() / other[name].abs().max().clamp(min=1)) for name in one)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("phase", [CONTRAST, EVERYTHING])
def test_losses_and_gradients_are_those_of_the_whole(phase: Phase, kind: str) -> None:
    parts, found = in_parts(phase, kind)
    loss, expected = as_a_whole(phase, kind)
    for part in parts:
        torch.testing.assert_close(part["itc"], loss, atol=2e-6, rtol=1e-5)
    assert distance(found, expected) < 1e-5
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 0.1
    assert float(expected["text.layers.0.mlp.up.weight"].abs().max()) > 1e-4
    assert kind == "tower" or float(expected["itc_head.pooled.weight"].abs().max()) > 1e-3


@pytest.mark.parametrize("kind", HEADS)
def test_control_other_draws_of_dropout_differ(kind: str) -> None:
    _, expected = as_a_whole(CONTRAST, kind)
    _, found = in_parts(CONTRAST, kind, again=lambda number: seed(number + 1))
    assert distance(found, expected) > 1e-3


def test_features_that_are_not_finite_name_their_batch() -> None:
    spoilt = replace(BATCHES[1], pixel_values=BATCHES[1].pixel_values * torch.nan)
    with pytest.raises(FloatingPointError, match="contrastive features are not finite; examples of the batch: 2, 0"):
        in_parts(CONTRAST, batches=[BATCHES[0], spoilt])


def test_which_steps_encode_their_micro_batches_twice(tiny_dataset: Path) -> None:
    phases = (Phase(until=0.5, itc=1), Phase())
    task = PretrainingConfig(phases=phases)
    config = shapes.run_config(tiny_dataset, task=task, contrast_over="step")
    assert [encodes_twice(config, progress, 2) for progress in (0.0, 0.4, 0.5, 0.9)] == [True, True, False, False]
    assert not encodes_twice(config, 0.0, 1)
    assert not encodes_twice(replace(config, contrast_over="micro-batch"), 0.0, 2)
