"""One optimiser step: its micro-batches, their gradients, and what stops a run before its weights are spoilt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bridgetower.data.batch import Batch, CaptionBatch, derive_seed
from bridgetower.distributed import all_gather, rank, world_size
from bridgetower.model.layers import autocast
from bridgetower.objectives.config import PretrainingConfig
from bridgetower.objectives.contrast import Contrast
from bridgetower.objectives.losses import Losses
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.data_parallel import Replicated
from bridgetower.training.fitting_size import does_not_fit
from bridgetower.training.gradient_cache import contrast_of_step, encodes_twice, keeps_pixels
from bridgetower.training.setup import TrainContext


def count_micro_batches(config: RunConfig) -> int:
    """Returns the number of micro-batches that each process makes of its share of a step."""
    share = max(config.batch_size // world_size(), 1)
    return -(-share // (config.micro_batch_size or share))


def run_step(
    task: Replicated, context: TrainContext, optimizer: Optimizer, batches: Iterator[Batch], step: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Runs a step, counted from 0, over its micro-batches; returns their mean losses and metrics, and their examples.

    On a CPU, losses and gradients that are not finite stop it before the weights change. A GPU is not waited for:
    `StepWatch` looks at what is returned.

    Args:
        task: `context.task`, as `parallelized` returns it.
        context: Of the run.
        optimizer: Its learning rates are set.
        batches: The micro-batches of this step are next, twice if `encodes_twice` but not `keeps_pixels`. If there are
            several and `counts_labels`, the first one has the `step_labels`.
        step: Decides what dropout draws.

    Raises:
        FloatingPointError: Features, a loss or a gradient are not finite; the batch's ids are named.
    """
    config, count, device = context.config, count_micro_batches(context.config), context.model.device
    progress = step / context.max_steps
    context.task.progress = progress  # type: ignore[assignment]
    on_cpu = device.type == "cpu"
    contrasts, batches = _contrasts(context, batches, step, count)
    means: dict[str, Tensor] = {}
    ids: list[str] = []
    own: Iterator[Any] = (_on_device(batch, context) for batch in islice(batches, count))
    if count * world_size() > 1 and counts_labels(config, progress):
        own = _weighted(own, count)
    for micro, batch in enumerate(own):
        ids += batch.ids
        _seed_dropout(config, step, micro)
        with task.accumulating(when=micro + 1 < count):
            inputs = (batch, contrasts[micro]) if contrasts else (batch,)
            losses = None
            with suppress(torch.OutOfMemoryError):
                losses = _pass(task, context, inputs, step, count)
        if losses is None:  # after the error and what it held are gone
            optimizer.zero_grad(set_to_none=True)
            raise does_not_fit(batch, lambda part: _pass(task, context, (part,), step, count))
        for name, value in {**losses.parts, **losses.metrics, "loss": losses.total}.items():
            means[name] = means.get(name, 0.0) + value.detach() / count
    means["gradient_norm"] = task.clip_gradients(config.optimizer.clip_norm)
    if on_cpu:
        check_gradients(means["gradient_norm"], ids, step + 1)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return means, ids


def _pass(task: Replicated, context: TrainContext, inputs: tuple[Any, ...], step: int, count: int) -> Losses:
    """Runs a micro-batch forward and backward; its gradients are added to those that are there."""
    device = context.model.device
    with autocast(device, context.config.precision):
        losses: Losses = task(*inputs)
    if device.type == "cpu":
        _check_finite(losses, inputs[0], step + 1)
    (losses.total / count).backward()
    return losses


def _on_device(batch: Any, context: TrainContext) -> Any:
    """Moves a batch to the device of the model; pixels that came as uint8 are normalised there."""
    device = context.model.device
    moved = batch.to(device)
    raw = {
        name: context.images[0].processor.normalise(value)
        for name, value in vars(moved).items()
        if context.images and isinstance(value, Tensor) and value.dtype == torch.uint8
    }
    return replace(moved, **raw) if raw else moved


def counts_labels(config: RunConfig, progress: float) -> bool:
    """Whether a step divides MLM by the labels of all its micro-batches and processes.

    Args:
        config: Of the run.
        progress: Share of the run that is done.
    """
    task = config.task
    return isinstance(task, PretrainingConfig) and task.mlm_normalization == "step" and task.phase(progress).mlm > 0


def _weighted(batches: Iterator[CaptionBatch], count: int) -> Iterator[CaptionBatch]:
    """Weighs MLM of each micro-batch so that the mean over all of them is that over the labels of the step.

    Everything else is a mean over examples, of which all micro-batches have as many.
    """
    mean: Tensor | None = None
    for batch in batches:
        if mean is None:
            own = batch.num_labels if count == 1 else batch.step_labels
            assert own is not None
            mean = all_gather(own[None]).sum().clamp(min=1) / (count * world_size())
        yield replace(batch, mlm_weight=batch.num_labels / mean)


def _contrasts(
    context: TrainContext, batches: Iterator[Any], step: int, count: int
) -> tuple[list[Contrast], Iterator[Any]]:
    """ITC over the whole step, for each of its micro-batches, and where these come from then.

    Nothing is computed where each compares its own pairs.
    """
    config, task, kept = context.config, context.task, list[Batch]()
    if not encodes_twice(config, task.progress, count):  # type: ignore[arg-type]
        return [], batches
    keeps = keeps_pixels(config, context.model.config.vision.image_size)
    first = islice(batches, count)
    contrasts = contrast_of_step(
        task,  # type: ignore[arg-type]
        (_on_device(batch, context) for batch in (_keeping(first, kept) if keeps else first)),
        lambda micro: _seed_dropout(config, step, micro),
        partial(autocast, context.model.device, config.precision),
    )
    return contrasts, iter(kept) if keeps else batches


def _keeping(batches: Iterator[Batch], kept: list[Batch]) -> Iterator[Batch]:
    """Yields batches and keeps them; of what is not pinned a copy, as a worker's memory holds files open."""
    for batch in batches:
        kept.append(batch if torch.cuda.is_available() else batch.copied())
        yield batch


def _seed_dropout(config: RunConfig, step: int, micro: int) -> None:
    torch.manual_seed(derive_seed(config.seed, "dropout", step, rank(), micro))


def check_gradients(norm: Tensor, ids: Sequence[str], step: int) -> None:
    """Raises before the weights are spoilt; gradients are averaged, so with several processes it is in all of them."""
    if not torch.isfinite(norm):
        raise FloatingPointError(
            f"gradients are not finite at step {step}: norm {norm.item()}; examples of this process's batch: "
            f"{', '.join(ids)}. Lower the learning rate, or look at these images"
        )


def _check_finite(losses: Losses, batch: Batch, step: int) -> None:
    if not torch.isfinite(losses.total):
        values = {name: value.item() for name, value in losses.parts.items()}
        raise FloatingPointError(
            f"loss is not finite at step {step}: {values}; examples of the batch: {', '.join(batch.ids)}. "
            "Lower the learning rate, clip gradients, or look at these images"
        )
