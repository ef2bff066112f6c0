"""The training loop: the only file that knows Fabric."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric as Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from bridgetower.data.batch import CaptionBatch
from bridgetower.data.captions import CaptionPairs, StepSampler, derive_seed
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.tasks.losses import Losses
from bridgetower.training.config import RunConfig
from bridgetower.training.logs import RunLog, mean_over_ranks
from bridgetower.training.optim import build_optimizer, parameter_groups, schedule
from bridgetower.training.state import TrainingState, load_state, save_state

logger = logging.getLogger(__name__)

Evaluate = Callable[[], dict[str, float]]


class Task(Protocol):
    """What the loop trains: batch in, losses out; `progress` is set to the share of the run that is done."""

    progress: float

    def __call__(self, batch: CaptionBatch) -> Losses:
        """Returns the losses of a batch."""
        ...


class Interrupted(Exception):  # noqa: N818 - not an error: the run stopped as it was asked to
    """The run was told to stop (SIGTERM, SIGINT) and saved its state; `--resume` continues it."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run consists of, built by `bridgetower.training.run`.

    Attributes:
        config: Decides the result.
        task: Model and losses.
        model: The model that the task trains.
        pairs: What it is trained on.
        digests: Of the files that the run reads, by path.
        evaluate: Gives the validation figures.
        save: Writes the weights as a checkpoint to a folder.
        max_steps: Optimiser steps of the whole run.
    """

    config: RunConfig
    task: nn.Module
    model: BridgeTower
    pairs: CaptionPairs
    digests: Mapping[str, str]
    evaluate: Evaluate
    save: Callable[[Path], None]
    max_steps: int


def make_fabric(config: RunConfig) -> Fabric:
    """Starts Fabric for one process, or for all those that torchrun started."""
    precision: Any = {"fp32": "32-true", "bf16": "bf16-mixed"}[config.precision]
    if torch.distributed.is_torchelastic_launched():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        fabric = Fabric(
            accelerator=config.device,
            devices=local,
            num_nodes=int(os.environ["WORLD_SIZE"]) // local,
            # Heads and towers that the current phase does not use get no gradient.
            strategy=DDPStrategy(find_unused_parameters=True),
            precision=precision,
        )
    else:
        fabric = Fabric(accelerator=config.device, devices=1, precision=precision)
    fabric.launch()
    return fabric


def fit(parts: Parts, fabric: Fabric, out: Path, *, resume: bool, progress: bool = True) -> dict[str, float]:
    """Trains to the end and returns the last evaluation; a finished run only returns it.

    Args:
        parts: Task, data, evaluation.
        fabric: From `make_fabric`.
        out: Folder of the run.
        resume: Continue from the state in `out`, in the middle of an epoch if need be.
        progress: Show a bar.

    Raises:
        ValueError: The state to resume is damaged, or was written with other data or another number of processes.
        FloatingPointError: A loss or a gradient is not finite; the batch's ids are named.
        Interrupted: A signal asked to stop; the state is saved.
    """
    config = parts.config
    optimizer = build_optimizer(parameter_groups(parts.model, config.optimizer), config.optimizer)
    task, optimizer = fabric.setup(parts.task, optimizer)
    state = load_state(out, parts.model, optimizer, _conditions(parts, fabric)) if resume else TrainingState()
    if 0 < state.step == parts.max_steps:
        logger.info("%s is finished: all %d steps are done", out, state.step)
        return state.figures
    batches = _batches(parts, fabric, state.step)
    factor = schedule(config.optimizer, parts.max_steps)
    _warn_of_small_contrast(config, fabric)
    log = RunLog(out, config, parts.max_steps, state.step, enabled=fabric.global_rank == 0, progress=progress)
    with log, _signals() as stop:
        for step in range(state.step, parts.max_steps):
            torch.manual_seed(derive_seed(config.seed, "dropout", step, fabric.global_rank))
            _set_lr(optimizer, factor(step))
            started = time.perf_counter()
            losses = _step(fabric, task, parts, optimizer, batches, step)
            state.step = step + 1
            if log.due(state.step):
                losses = mean_over_ranks(losses)
            log.step(state.step, losses, optimizer.param_groups[0]["lr"], time.perf_counter() - started)
            last = state.step == parts.max_steps
            if last or (config.evaluate_every and state.step % config.evaluate_every == 0):
                state.figures = _evaluate(fabric, parts, state, log, out)
            stopping = _any_rank(fabric, stop.requested)
            if last or stopping or state.step % config.checkpoint_every == 0:
                _save(fabric, out, parts, optimizer, state)
            if stopping and not last:
                raise Interrupted(f"stopped after step {state.step} of {parts.max_steps}; --resume continues it")
    return state.figures


def _batches(parts: Parts, fabric: Fabric, first_step: int) -> Iterator[CaptionBatch]:
    config = parts.config
    sampler = StepSampler(
        len(parts.pairs),
        batch_size=config.batch_size,
        micro_batches=_micro_batches(config, fabric.world_size),
        steps=range(first_step, parts.max_steps),
        seed=config.seed,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    workers = config.data.num_workers
    loader: DataLoader[Any] = DataLoader(
        parts.pairs,
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=fabric.device.type == "cuda",
    )
    return iter(loader)


def _micro_batches(config: RunConfig, world_size: int) -> int:
    share = max(config.batch_size // world_size, 1)
    return -(-share // (config.micro_batch_size or share))


def _warn_of_small_contrast(config: RunConfig, fabric: Fabric) -> None:
    if config.task.contrasts and _micro_batches(config, fabric.world_size) > 1 and fabric.global_rank == 0:
        logger.warning(
            "ITC and hard negatives see one micro-batch of %s pairs per process, not the batch of %s; raise "
            "micro_batch_size, or add processes, to contrast more",
            config.micro_batch_size,
            config.batch_size,
        )


def _step(
    fabric: Fabric, task: Any, parts: Parts, optimizer: Optimizer, batches: Iterator[CaptionBatch], step: int
) -> dict[str, Tensor]:
    """One optimiser step over its micro-batches; returns their mean losses and figures."""
    micro_batches = _micro_batches(parts.config, fabric.world_size)
    parts.task.progress = step / parts.max_steps  # type: ignore[assignment]
    means: dict[str, Tensor] = {}
    ids: list[str] = []
    for micro in range(micro_batches):
        batch = next(batches).to(fabric.device)
        ids += batch.ids
        with fabric.no_backward_sync(task, enabled=micro + 1 < micro_batches):
            losses: Losses = task(batch)
            _check_finite(losses, batch, step + 1)
            fabric.backward(losses.total / micro_batches)
        for name, value in {**losses.parts, **losses.metrics, "loss": losses.total}.items():
            means[name] = means.get(name, 0.0) + value.detach() / micro_batches
    means["gradient_norm"] = _clip(fabric, task, parts.config.optimizer.clip_norm, optimizer)
    _check_gradients(means["gradient_norm"], ids, step + 1)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return means


def _clip(fabric: Fabric, task: Any, clip_norm: float | None, optimizer: Optimizer) -> Tensor:
    """Clips the gradients if asked to; returns their norm of before."""
    limit = math.inf if clip_norm is None else clip_norm
    norm = fabric.clip_gradients(task, optimizer, max_norm=limit, error_if_nonfinite=False)
    return torch.as_tensor(norm)


def _check_gradients(norm: Tensor, ids: Sequence[str], step: int) -> None:
    """Raises before the weights are spoilt; gradients are averaged, so with several processes it is in all of them."""
    if not torch.isfinite(norm):
        raise FloatingPointError(
            f"gradients are not finite at step {step}: norm {norm.item()}; examples of this process's batch: "
            f"{', '.join(ids)}. Lower the learning rate, or look at these pictures"
        )


def _check_finite(losses: Losses, batch: CaptionBatch, step: int) -> None:
    if not torch.isfinite(losses.total):
        values = {name: value.item() for name, value in losses.parts.items()}
        raise FloatingPointError(
            f"loss is not finite at step {step}: {values}; examples of the batch: {', '.join(batch.ids)}. "
            "Lower the learning rate, clip gradients, or look at these pictures"
        )


def _evaluate(fabric: Fabric, parts: Parts, state: TrainingState, log: RunLog, out: Path) -> dict[str, float]:
    parts.task.eval()
    figures = parts.evaluate()
    parts.task.train()
    log.evaluation(state.step, figures)
    score = figures.get(parts.config.select_by)
    if score is None:
        raise ValueError(f"select_by is {parts.config.select_by!r}; the evaluation gave {sorted(figures)}")
    if state.best is None or score > state.best:
        state.best, state.best_step = score, state.step
        if fabric.global_rank == 0:
            parts.save(out / "best")
    return figures


def _conditions(parts: Parts, fabric: Fabric) -> dict[str, str | int]:
    """What decides the result beside the config: the data, and how a batch is cut, which decides the negatives."""
    contents = {f"content of {path}": digest for path, digest in parts.digests.items()}
    micro_batches = _micro_batches(parts.config, fabric.world_size)
    return {"number of processes": fabric.world_size, "micro-batches of each": micro_batches, **contents}


def _save(fabric: Fabric, out: Path, parts: Parts, optimizer: Optimizer, state: TrainingState) -> None:
    if fabric.global_rank == 0:
        save_state(out, parts.model, optimizer, state, _conditions(parts, fabric))
    fabric.barrier()


def _set_lr(optimizer: Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def _any_rank(fabric: Fabric, requested: bool) -> bool:
    if fabric.world_size == 1:
        return requested
    requests = torch.tensor(float(requested), device=fabric.device)
    torch.distributed.all_reduce(requests)
    return bool(requests > 0)


class _Stop:
    requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        logger.warning("%s: stopping after this step", signal.Signals(number).name)


@contextmanager
def _signals() -> Iterator[_Stop]:
    """Turns SIGTERM and SIGINT into a request that the loop honours after the current step."""
    stop = _Stop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
