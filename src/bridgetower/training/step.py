"""One optimiser step: its micro-batches, their gradients, and what stops a run before its weights are spoilt."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from bridgetower.data.batch import Batch, CaptionBatch, derive_seed
from bridgetower.distributed import all_gather, rank, world_size
from bridgetower.model.layers import autocast
from bridgetower.objectives.losses import Contrast, Losses
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.data_parallel import Replicated
from bridgetower.training.setup import TrainContext

_ADVICE = (
    "Go on with --resume and a lower learning rate, --optimizer.clip-norm or --max-skipped-steps; or look at the images"
)

logger = logging.getLogger(__name__)


KEPT_BYTES = 2**31  # of pixels that a process keeps between the two passes of a step; more are read again


def count_micro_batches(config: RunConfig) -> int:
    """Of each process, for its share of a step."""
    share = max(config.batch_size // world_size(), 1)
    return -(-share // (config.micro_batch_size or share))


def run_step(
    task: Replicated, context: TrainContext, optimizer: Optimizer, batches: Iterator[Batch], step: int, skipped: int = 0
) -> tuple[dict[str, Tensor], list[str], bool]:
    """Runs a step, counted from 0, over its micro-batches; returns means, ids, and whether it was skipped.

    On a CPU, losses and gradients that are not finite stop it before the weights change. A GPU is not waited for:
    `StepWatch` looks at what is returned. If steps may be skipped, every device is waited for.
    """
    config, count, device = context.config, count_micro_batches(context.config), context.model.device
    progress = step / context.max_steps
    context.task.progress = progress  # type: ignore[assignment]
    on_cpu = device.type == "cpu"
    may_skip = skipped < config.max_skipped_steps
    contrasts, batches = _contrasts(context, batches, step, count, check=not may_skip)
    means: dict[str, Tensor] = {}
    ids: list[str] = []
    own: Iterator[Any] = (_on_device(batch, context) for batch in islice(batches, count))
    if count * world_size() > 1 and config.task.counts_labels(progress):
        own = _weighted(own, count)
    for micro, batch in enumerate(own):
        ids += batch.ids
        _seed_dropout(config, step, micro)
        with task.accumulating(when=micro + 1 < count):
            inputs = (batch, contrasts[micro]) if contrasts else (batch,)
            losses = None
            with suppress(torch.OutOfMemoryError):
                losses = _pass(task, context, inputs, step, count, check=on_cpu and not may_skip)
        if losses is None:  # after the error and what it held are gone
            optimizer.zero_grad(set_to_none=True)
            raise does_not_fit(batch, lambda part: _pass(task, context, (part,), step, count, check=False))
        for name, value in {**losses.parts, **losses.metrics, "loss": losses.total}.items():
            means[name] = means.get(name, 0.0) + value.detach() / count
    norm = means["gradient_norm"] = task.clip_gradients(config.optimizer.clip_norm)
    # The norm is of the averaged gradients, so that all processes skip the same steps.
    skips = may_skip and not bool(torch.isfinite(norm))
    if skips:
        logger.warning(
            "step %d is skipped, the %d. of %d that may be: its gradients are not finite; examples of this process's "
            "batch: %s",
            step + 1,
            skipped + 1,
            config.max_skipped_steps,
            ", ".join(ids),
        )
    else:
        if on_cpu:
            check_gradients(norm, ids, step + 1)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return means, ids, skips


def _pass(
    task: Replicated, context: TrainContext, inputs: tuple[Any, ...], step: int, count: int, *, check: bool
) -> Losses:
    device = context.model.device
    with autocast(device, context.config.precision):
        losses: Losses = task(*inputs)
    if check and not torch.isfinite(losses.total):
        values, ids = {name: value.item() for name, value in losses.parts.items()}, ", ".join(inputs[0].ids)
        raise FloatingPointError(
            f"loss is not finite at step {step + 1}: {values}; examples of the batch: {ids}. {_ADVICE}"
        )
    (losses.total / count).backward()
    return losses


def _on_device(batch: Any, context: TrainContext) -> Any:
    """Moves a batch to the device of the model; pixels that came as uint8 are normalised there."""
    device = context.model.device
    return context.images[0].on_device(batch, device) if context.images else batch.to(device)


def _weighted(batches: Iterator[CaptionBatch], count: int) -> Iterator[CaptionBatch]:
    """Weighs MLM of each micro-batch so that the mean over all of them is that over the labels of the step."""
    mean: Tensor | None = None
    for batch in batches:
        if mean is None:
            own = batch.num_labels if count == 1 else batch.step_labels
            assert own is not None
            mean = all_gather(own[None]).sum().clamp(min=1) / (count * world_size())
        yield replace(batch, mlm_weight=batch.num_labels / mean)


def _contrasts(
    context: TrainContext, batches: Iterator[Any], step: int, count: int, *, check: bool
) -> tuple[list[Contrast], Iterator[Any]]:
    """ITC over the whole step, for each of its micro-batches, and where these come from then."""
    config, task, kept = context.config, context.task, list[Batch]()
    if not encodes_twice(config, task.progress, count):  # type: ignore[arg-type]
        return [], batches
    keeps = keeps_pixels(config, context.model.config.vision.image_size)

    def first() -> Iterator[Any]:
        for batch in islice(batches, count):
            if keeps:  # of what is not pinned a copy, as a worker's memory holds files open
                kept.append(batch if torch.cuda.is_available() else batch.copied())
            yield _on_device(batch, context)

    contrasts = contrast_of_step(
        task,
        first(),
        lambda micro: _seed_dropout(config, step, micro),
        partial(autocast, context.model.device, config.precision),
        check=check,
    )
    return contrasts, iter(kept) if keeps else batches


def _seed_dropout(config: RunConfig, step: int, micro: int) -> None:
    torch.manual_seed(derive_seed(config.seed, "dropout", step, rank(), micro))


def check_gradients(norm: Tensor, ids: Sequence[str], step: int) -> None:
    """Gradients are averaged, so with several processes it raises in all of them."""
    if not torch.isfinite(norm):
        raise FloatingPointError(
            f"gradients are not finite at step {step}: norm {norm.item()}; examples of this process's batch: "
            f"{', '.join(ids)}. {_ADVICE}"
        )


def encodes_twice(config: RunConfig, progress: float, micro_batches: int) -> bool:
    if config.contrast_over != "step" or micro_batches == 1:
        return False
    return config.task.contrasts_pairs(progress)


def keeps_pixels(config: RunConfig, image_size: int) -> bool:
    """Whether the pixels of a process, as uint8, are kept between its two passes."""
    return not config.freeze_towers and config.batch_size // world_size() * 3 * image_size**2 <= KEPT_BYTES


def contrast_of_step(
    task: Any,
    batches: Iterable[CaptionBatch],
    seed: Callable[[int], None],
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    *,
    check: bool = True,
) -> list[Contrast]:
    """Encodes all micro-batches in turn without a graph and compares all pairs of all processes."""
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


class StepWatch:
    """Looks at the numbers of each step; on a GPU when the next step has begun, so that none is waited for."""

    def __init__(self) -> None:
        self._open: deque[tuple[int, Tensor, torch.cuda.Event | None, Sequence[str]]] = deque()
        self._stop = False

    def note(
        self, step: int, means: Mapping[str, Tensor], ids: Sequence[str], *, stop: bool, skipped: bool = False
    ) -> bool:
        """Takes the numbers of a step; returns whether a process asked to stop, as far as is known."""
        norm = means["gradient_norm"]
        stops = torch.tensor(float(stop)).to(norm.device, non_blocking=True)
        if world_size() > 1:
            dist.all_reduce(stops)
        checked = torch.zeros_like(norm) if skipped else means["loss"].float() * 0 + norm
        values, event = torch.stack([stops, checked]), None
        if norm.is_cuda:
            values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._open.append((step, values, event, ids))
        self.settle(leave=1 if norm.is_cuda else 0)
        return self._stop

    def settle(self, *, leave: int = 0) -> None:
        while len(self._open) > leave:
            step, values, event, ids = self._open.popleft()
            if event is not None:
                event.synchronize()
            stops, norm = values.unbind()
            check_gradients(norm, ids, step)
            self._stop |= bool(stops > 0)


def does_not_fit(batch: Any, run: Callable[[Any], object]) -> ValueError:
    size, fits = len(batch) // 2, None
    if world_size() > 1:
        return ValueError(f"a micro-batch of {len(batch)} does not fit into memory; try --micro-batch-size {size}")
    while size and fits is None:
        torch.cuda.empty_cache()
        with suppress(torch.OutOfMemoryError):
            run(_first(batch, size))
            fits = size
        size //= 2
    advice = f"one of {fits} does: use --micro-batch-size {fits}"
    if fits is None:
        smaller = "--checkpoint-activations vision text fusion, --parallel fsdp or a smaller model"
        advice = f"nor does one of 1; use {smaller}"
    return ValueError(f"a micro-batch of {len(batch)} does not fit into memory, {advice}")


def _first(batch: Any, count: int) -> Any:
    parts: dict[str, Any] = {}
    for name, value in vars(batch).items():
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) % len(batch) == 0:
            parts[name] = value[: count * len(value) // len(batch)]
    if "mlm_positions" in vars(batch):
        parts["mlm_positions"] = None  # they are looked for
    return replace(batch, ids=batch.ids[:count], **parts)
