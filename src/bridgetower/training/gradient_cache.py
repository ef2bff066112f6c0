"""ITC over all pairs of an optimiser step in the memory of one micro-batch: features first, gradients per part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from bridgetower.data.batch import CaptionBatch
from bridgetower.distributed import world_size
from bridgetower.objectives.contrast import Contrast
from bridgetower.tasks.run_config import RunConfig

KEPT_BYTES = 2**31
"""Pixels of a step up to which a process keeps them between the two passes; more are read again."""


def encodes_twice(config: RunConfig, progress: float, micro_batches: int) -> bool:
    """Whether a step encodes its micro-batches once for their features and once more for gradients."""
    if config.contrast_over != "step" or micro_batches == 1:
        return False
    return config.task.contrasts_pairs(progress)


def keeps_pixels(config: RunConfig, image_size: int) -> bool:
    """Whether the pixels of a process's share of a step, as uint8, are few enough to be kept between its two passes."""
    return config.batch_size // world_size() * 3 * image_size**2 <= KEPT_BYTES


def contrast_of_step(
    task: Any,
    batches: Iterable[CaptionBatch],
    seed: Callable[[int], None],
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    *,
    check: bool = True,
) -> list[Contrast]:
    """Encodes all micro-batches without a graph and compares all pairs of all processes.

    One micro-batch is in memory at a time; of the others there are only the features.
    """
    features = []
    with torch.no_grad():
        for number, batch in enumerate(batches):
            seed(number)
            with precision():
                features.append(task.features(batch))
            embeds = features[-1].embeds
            if check and embeds[0].device.type == "cpu" and not all(torch.isfinite(each).all() for each in embeds):
                raise FloatingPointError(
                    f"contrastive features are not finite; examples of the batch: {', '.join(batch.ids)}. Lower the "
                    "learning rate, clip gradients, or look at these images"
                )
    return task.contrast(features)
