"""One optimiser step over its micro-batches, and the checks that stop a run before its weights are spoilt."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from bridgetower.data.batches.batch import Batch, CaptionBatch, derive_seed
from bridgetower.distributed import all_gather, rank, world_size
from bridgetower.model.layers import autocast
from bridgetower.objectives.losses import Contrast, Losses
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.data_parallel import Replicated
from bridgetower.training.setup import TrainContext

_ADVICE = (
    "Go on with --resume and a lower learning rate, --optimizer.clip-norm or --max-skipped-steps; "
    "or look at the images"
)

KEPT_BYTES = 2**31
"""Pixels that a process keeps between the two passes of a step; more are read again."""

logger = logging.getLogger(__name__)


def count_micro_batches(config: RunConfig) -> int:
    """Counts the micro-batches of each process in a step."""
    share = max(config.batch_size // world_size(), 1)
    return -(-share // (config.micro_batch_size or share))


def check_batch_size(config: RunConfig, num_examples: int) -> None:
    """Refuses a batch of more examples than there are, or of examples that processes cannot share out evenly."""
    if num_examples < world_size():
        raise ValueError(
            f"{num_examples} training examples are fewer than {world_size()} processes; start at most as many as there "
            "are examples"
        )
    if num_examples < config.batch_size:
        size = num_examples
        while size % (world_size() * count_micro_batches(replace(config, batch_size=size))):
            size -= 1
        raise ValueError(
            f"{num_examples} training examples are fewer than one batch of {config.batch_size}; use batch_size {size}"
        )
    micro_batches = count_micro_batches(config)
    if config.batch_size % (world_size() * micro_batches):
        raise ValueError(
            f"batch_size {config.batch_size} does not split into {world_size()} processes x {micro_batches} "
            f"micro-batches; use a multiple of {world_size() * micro_batches}"
        )


def encodes_twice(config: RunConfig, progress: float, micro_batches: int) -> bool:
    """Whether ITC over a step of several micro-batches needs a pass without gradients before the others."""
    return (
        config.contrast_over == "step"
        and micro_batches > 1
        and config.task.contrasts_pairs(progress)
    )


def keeps_pixels(config: RunConfig, image_size: int) -> bool:
    """Whether a process keeps its pixels, as uint8, between its two passes."""
    num_bytes = config.batch_size // world_size() * 3 * image_size**2
    return not config.freeze_towers and num_bytes <= KEPT_BYTES


def run_step(
    task: Replicated,
    context: TrainContext,
    optimizer: Optimizer,
    batches: Iterator[Batch],
    step: int,
    skipped: int = 0,
) -> tuple[dict[str, Tensor], list[str], bool]:
    """Runs a step, counted from 0, and returns its means, its ids, and whether it was skipped.

    On a CPU, losses and gradients that are not finite raise an error before the weights change. A GPU is not waited
    for: `StepWatch` checks the returned means. If steps may be skipped, every device is waited for.
    """
    config = context.config
    device = context.model.device
    count = count_micro_batches(config)
    progress = step / context.max_steps
    context.task.progress = progress  # type: ignore[assignment]
    may_skip = skipped < config.max_skipped_steps
    is_checked = device.type == "cpu" and not may_skip

    def seed_dropout(micro: int) -> None:
        torch.manual_seed(derive_seed(config.seed, "dropout", step, rank(), micro))

    # For ITC over the step, encode all micro-batches first.
    contrasts: list[Contrast] = []
    if encodes_twice(config, progress, count):
        first_pass = _FirstPass(
            islice(batches, count),
            keeps=keeps_pixels(config, context.model.config.vision.image_size),
        )
        contrasts = contrast_of_step(
            context.task,
            map(context.to_device, first_pass),
            seed_dropout,
            partial(autocast, device, config.precision),
            check=is_checked,
        )
        batches = chain(first_pass.batches, batches)

    # Run each micro-batch forward and backward.
    means: dict[str, Tensor] = {}
    ids: list[str] = []
    counts_labels = count * world_size() > 1 and config.task.counts_labels(progress)
    for micro, batch in enumerate(map(context.to_device, islice(batches, count))):
        if counts_labels:  # the mean over the micro-batches is then one over all labels
            if micro == 0:
                labels = batch.num_labels if count == 1 else batch.step_labels
                mean_labels = all_gather(labels[None]).sum().clamp(min=1) / (count * world_size())
            batch = replace(batch, mlm_weight=batch.num_labels / mean_labels)
        ids += batch.ids
        seed_dropout(micro)
        try:
            with task.accumulating(when=micro + 1 < count):
                with autocast(device, config.precision):
                    losses = task(batch, contrasts[micro]) if contrasts else task(batch)
                if is_checked:
                    _check_loss(losses, batch, step + 1)
                (losses.total / count).backward()
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"a micro-batch of {len(batch)} does not fit into memory; try a smaller --micro-batch-size, "
                "--checkpoint-activations vision text fusion, --parallel fsdp or a smaller model"
            ) from error
        for name, value in {**losses.terms, **losses.metrics, "loss": losses.total}.items():
            means[name] = means.get(name, 0.0) + value.detach() / count

    # Change the weights. The norm is that of the averaged gradients, so all processes skip the same steps.
    norm = task.clip_gradients(config.optimizer.clip_norm)
    means["gradient_norm"] = norm
    is_skipped = may_skip and not bool(torch.isfinite(norm))
    if is_skipped:
        logger.warning(
            "step %d is skipped, the %d. of %d that may be: its gradients are not finite; examples of this process's "
            "batch: %s",
            step + 1,
            skipped + 1,
            config.max_skipped_steps,
            ", ".join(ids),
        )
    else:
        if device.type == "cpu":
            check_gradients(norm, ids, step + 1)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return means, ids, is_skipped


class _FirstPass:
    """Micro-batches of the first of two passes, which are kept for the second one if `keeps`."""

    def __init__(self, source: Iterator[Batch], *, keeps: bool) -> None:
        self.source = source
        self.keeps = keeps
        self.batches: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.source:
            if self.keeps:  # as a copy unless it is pinned: the memory of a worker holds files open
                self.batches.append(batch if torch.cuda.is_available() else batch.copied())
            yield batch


def _check_loss(losses: Losses, batch: Batch, step: int) -> None:
    if not torch.isfinite(losses.total):
        values = {name: value.item() for name, value in losses.terms.items()}
        raise FloatingPointError(
            f"loss is not finite at step {step}: {values}; examples of the batch: "
            f"{', '.join(batch.ids)}. {_ADVICE}"
        )


def contrast_of_step(
    task: Any,
    batches: Iterable[CaptionBatch],
    seed_dropout: Callable[[int], None],
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    *,
    check: bool = True,
) -> list[Contrast]:
    """Encodes all micro-batches in turn without a graph and compares all pairs of all processes."""
    features = []
    with torch.no_grad():
        for micro, batch in enumerate(batches):
            seed_dropout(micro)
            with precision():
                features.append(task.features(batch))
            if check and not all(torch.isfinite(rows).all() for rows in features[-1].embeds):
                raise FloatingPointError(
                    f"contrastive features are not finite; examples of the batch: {', '.join(batch.ids)}. Lower the "
                    "learning rate, clip gradients, or look at these images"
                )
    return task.contrast(features)


def check_gradients(norm: Tensor, ids: Sequence[str], step: int) -> None:
    """Raises an error in all processes, as the norm is that of averaged gradients."""
    if not torch.isfinite(norm):
        raise FloatingPointError(
            f"gradients are not finite at step {step}: norm {norm.item()}; examples of this process's batch: "
            f"{', '.join(ids)}. {_ADVICE}"
        )


class StepWatch:
    """Checks the means of each step. On a GPU this waits until the next step has begun."""

    def __init__(self) -> None:
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None, Sequence[str]]] = deque()
        self._is_stopping = False

    def note(
        self,
        step: int,
        means: Mapping[str, Tensor],
        ids: Sequence[str],
        *,
        stop: bool,
        skipped: bool = False,
    ) -> bool:
        """Takes the means of a step, and returns whether a process is known to have asked to stop."""
        norm = means["gradient_norm"]
        checked = torch.zeros_like(norm) if skipped else means["loss"].float() * 0 + norm
        values = torch.stack([torch.full_like(norm, float(stop)), checked])
        if world_size() > 1:
            dist.all_reduce(values)
        event = None
        if norm.is_cuda:
            values = values.to("cpu", non_blocking=True)  # into pinned memory
            event = torch.cuda.current_stream().record_event()
        self._pending.append((step, values, event, ids))
        self.settle(leave=1 if norm.is_cuda else 0)
        return self._is_stopping

    def settle(self, *, leave: int = 0) -> None:
        """Checks all steps but the last `leave`."""
        while len(self._pending) > leave:
            step, values, event, ids = self._pending.popleft()
            if event is not None:
                event.synchronize()
            stops, norm = values.unbind()
            check_gradients(norm, ids, step)
            self._is_stopping |= bool(stops > 0)
