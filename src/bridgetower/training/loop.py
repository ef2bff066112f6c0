"""The training loop: goes through the steps, evaluates, saves, stops and resumes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

from torch.optim import Optimizer

from bridgetower.data.batch import Batch
from bridgetower.data.order import EpochOrder, OneSetPerBatch, ShardOrder, StepSampler
from bridgetower.data.shards import FetchAhead
from bridgetower.distributed import from_first, rank, require_same, world_size
from bridgetower.model.layers import autocast
from bridgetower.objectives.config import PretrainingConfig
from bridgetower.processor import load_items
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.data_parallel import Replicated, parallelized
from bridgetower.training.gradient_cache import encodes_twice, keeps_pixels
from bridgetower.training.logs import RunLog, mean_over_ranks
from bridgetower.training.optim import build_optimizer, parameter_groups, schedule
from bridgetower.training.setup import TrainContext
from bridgetower.training.signals import stop_signals
from bridgetower.training.state import MICRO_BATCHES, PROCESSES, StateSaver, TrainingState, load_state
from bridgetower.training.step import check_gradients, count_micro_batches, counts_labels, run_step
from bridgetower.training.watch import StepWatch

logger = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818 - not an error: the run was stopped by a signal
    """The run was stopped (SIGTERM, SIGINT) and saved its state; `--resume` continues it."""


def fit(
    context: TrainContext,
    out: Path,
    *,
    resume: bool,
    allow_world_size_change: bool = False,
    async_checkpoints: bool = False,
    progress: bool = True,
) -> dict[str, float]:
    """Trains to the end and returns the last evaluation; a finished run only returns it.

    Args:
        context: Task, data, evaluation.
        out: Folder of the run.
        resume: Continue from the state in `out`, in the middle of an epoch if need be.
        allow_world_size_change: Continue with another number of processes.
        async_checkpoints: Write states while the run goes on.
        progress: Show a bar.

    Raises:
        ValueError: The state to resume is damaged, or was written with other data or another number of processes; or
            the processes have other data.
        FloatingPointError: A loss or a gradient is not finite; the batch's ids are named.
        Interrupted: A signal stopped it; the state is saved.
    """
    config = context.config
    task = parallelized(context.task, config.parallel)
    optimizer = build_optimizer(parameter_groups(context.model, config.optimizer), config.optimizer)
    conditions = _conditions(context)
    require_same(conditions)
    state = TrainingState()
    if resume:
        state = load_state(out, context.model, optimizer, conditions, allow_world_size_change=allow_world_size_change)
    if 0 < state.step == context.max_steps:
        logger.info("%s is finished: all %d steps are done", out, state.step)
        return state.metrics
    batches = _batches(context, state.step)
    factor = schedule(config.optimizer, context.max_steps)
    _warn_of_small_contrast(config)
    if config.data.trains_on_validation and rank() == 0:
        logger.warning(
            "%s is trained on, so its metrics say nothing about other data: there is no best/, only last/, and no "
            "calibration; leave it out of --data.train-splits, or give another --data.validation-split",
            config.data.validation_split,
        )
    if rank() == 0:
        steps = f"step {state.step + 1:,} to {context.max_steps:,}"
        logger.info("training: %s, %d of %d examples each", steps, config.batch_size, len(context.examples))
    log = RunLog(out, config, context.max_steps, state.step, enabled=rank() == 0, progress=progress)
    watch, saver = StepWatch(), StateSaver(out, conditions, asynchronous=async_checkpoints)
    with saver, log, stop_signals(lambda name: logger.warning("%s: stopping after this step", name)) as stop:
        for step in range(state.step, context.max_steps):
            _set_lr(optimizer, factor(step))
            started = time.perf_counter()
            losses, ids = run_step(task, context, optimizer, batches, step)
            state.step = step + 1
            if log.due(state.step):
                losses = mean_over_ranks(losses)
            log.step(state.step, losses, optimizer.param_groups[0]["lr"], time.perf_counter() - started)
            last = state.step == context.max_steps
            if last or (config.evaluate_every and state.step % config.evaluate_every == 0):
                check_gradients(losses["gradient_norm"], ids, state.step)  # best/ is of finite weights
                state.metrics = _evaluate(task, context, state, log)
                if config.select_by not in state.metrics:
                    watch.settle()
                    saver.save(context.model, optimizer, state)
                    raise ValueError(
                        f"select_by is {config.select_by!r}; the evaluation gave {sorted(state.metrics)}; the state of "
                        f"step {state.step} is saved, and --resume goes on from it"
                    )
                _keep_best(context, state, out)
            stopping = watch.note(state.step, losses, ids, stop=stop.requested)
            if last or stopping or state.step % config.checkpoint_every == 0:
                watch.settle()
                saver.save(context.model, optimizer, state)
            if stopping and not last:
                raise Interrupted(f"stopped after step {state.step} of {context.max_steps}; --resume continues it")
    return state.metrics


def _batches(context: TrainContext, first_step: int) -> Iterator[Batch]:
    config, micro_batches = context.config, count_micro_batches(context.config)
    kept = keeps_pixels(config, context.model.config.vision.image_size)
    sampler = StepSampler(
        len(context.examples),
        batch_size=config.batch_size,
        micro_batches=micro_batches,
        passes=lambda step: 2 if not kept and encodes_twice(config, step / context.max_steps, micro_batches) else 1,
        counted=lambda step: micro_batches > 1 and counts_labels(config, step / context.max_steps),
        steps=range(first_step, context.max_steps),
        seed=config.seed,
        order=_order(context),
        rank=rank(),
        world_size=world_size(),
    )
    device = context.model.device
    if context.images is not None:
        # A quarter of the bytes, on the way or kept.
        context.images[0].raw = device.type != "cpu" or (kept and config.contrast_over == "step")
    return load_items(context.examples.__getitem__, sampler, num_workers=config.data.num_workers, device=device)


def _order(context: TrainContext) -> EpochOrder | None:
    """Returns the order of examples whose images are at URLs or whose batches are of one set; None for others."""
    config, images = context.config, None if context.images is None else context.images[0]
    streamed = images is not None and images.remote and images.frozen is None
    if images is None or not (streamed or config.data.one_set_per_batch):
        return None
    numbers = getattr(context.examples, "image_numbers", None)
    if numbers is None:
        raise ValueError(
            f"the examples of {config.task.kind} have no image_numbers, which tell their sets and files; add it, or "
            "copy the sets to a disk and leave out one_set_per_batch"
        )
    if not streamed:
        return OneSetPerBatch(images.sets_of(numbers), config.batch_size, config.seed)
    if config.data.one_set_per_batch:
        raise ValueError("one_set_per_batch is for sets on a disk, and these are at URLs; copy them, or leave it out")
    return ShardOrder(images.shards_of(numbers), config.seed, config.data.shuffle_shards, FetchAhead(images.fetch))


def _warn_of_small_contrast(config: RunConfig) -> None:
    limited = config.task.contrasts if isinstance(config.task, PretrainingConfig) else []
    if config.contrast_over == "step":
        limited = [name for name in limited if name != "ITC"]
    if limited and count_micro_batches(config) > 1 and rank() == 0:
        logger.warning(
            "%s: one micro-batch of %s pairs per process is compared, not the batch of %s; raise micro_batch_size, "
            "or add processes (for ITC: contrast_over)",
            " and ".join(limited),
            config.micro_batch_size,
            config.batch_size,
        )


def _evaluate(task: Replicated, context: TrainContext, state: TrainingState, log: RunLog) -> dict[str, float]:
    """Returns the metrics of the first process in all of them, as these decide together what is saved."""
    device = context.model.device
    precision = "fp32" if device.type == "cpu" else context.config.precision
    with task.evaluating(), autocast(device, precision), log.validating():
        metrics: dict[str, float] = from_first(context.evaluate())
    log.evaluation(state.step, metrics)
    return metrics


def _keep_best(context: TrainContext, state: TrainingState, out: Path) -> None:
    if context.config.data.trains_on_validation:
        return
    score = state.metrics[context.config.select_by]
    if state.best is None or score > state.best:
        state.best, state.best_step = score, state.step
        context.save(out / "best", state.metrics)


def _conditions(context: TrainContext) -> dict[str, str | int]:
    """What decides the result beside the config: the data, and how a batch is cut, which decides the negatives."""
    contents = {f"content of {path}": digest for path, digest in context.digests.items()}
    return {PROCESSES: world_size(), MICRO_BATCHES: count_micro_batches(context.config), **contents}


def _set_lr(optimizer: Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
