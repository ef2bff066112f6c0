"""The training loop: goes through the steps, evaluates, saves, stops and resumes."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType, MappingProxyType

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from bridgetower.data.batch import Batch
from bridgetower.data.order import StepSampler
from bridgetower.distributed import from_first, rank, require_same, world_size
from bridgetower.model.layers import autocast
from bridgetower.processor import load_items
from bridgetower.training.data_parallel import Replicated
from bridgetower.training.loggers import LOGGERS, TENSORBOARD
from bridgetower.training.logs import RunLog, mean_over_ranks, peak_flops
from bridgetower.training.optim import build_optimizer, parameter_groups, schedule
from bridgetower.training.setup import TrainContext
from bridgetower.training.state import DATA, OPTIMIZER, StateSaver, TrainingState, load_state
from bridgetower.training.step import StepWatch, count_micro_batches, encodes_twice, keeps_pixels, run_step

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_SECONDS = 5.0
"""Within which signals are one request: launchers send theirs to the group, and then to each process again."""


class Interrupted(Exception):  # noqa: N818 - not an error: the run was stopped by a signal
    """The run was stopped and saved its state; `--resume` continues it.

    Attributes:
        signal: Which one came; SIGTERM if it came to another process.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message, number)
        self.signal = number

    def __str__(self) -> str:
        return str(self.args[0])


class Stop:
    """Whether the run has to stop, and which signal asked first."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.signal: signal.Signals | None = None
        self._announce, self._since = announce, 0.0

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Notes a signal and announces its name; one that comes later ends the process at once."""
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
            self._announce(self.signal.name)
        elif time.monotonic() - self._since > SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def stop_signals(announce: Callable[[str], None] = lambda name: None) -> Iterator[Stop]:
    """Turns SIGINT, SIGTERM and SIGHUP into a request; afterwards they do what they did before.

    Outside the main thread, where Python takes no signals, none is awaited.
    """
    stop = Stop(announce)
    numbers = SIGNALS if current_thread() is main_thread() else ()
    # A signal that is ignored stays so, as SIGHUP is below nohup.
    previous = {number: signal.signal(number, stop) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def fit(
    context: TrainContext,
    out: Path,
    *,
    resume: bool,
    async_checkpoints: bool = False,
    timeout: timedelta | None = None,
    report_to: Sequence[str] = (TENSORBOARD,),
    changed: Mapping[str, str] = MappingProxyType({}),
    change: Callable[[], None] = lambda: None,
    progress: bool = True,
) -> dict[str, float]:
    """Trains to the end, writes `last/` and returns the last evaluation; a finished run only returns it."""
    config = context.config
    if config.parallel == "ddp" or world_size() == 1:
        task = Replicated(context.task)
    else:
        from bridgetower.training.sharding import Sharded

        task = Sharded(context.task, config.precision)
    optimizer = build_optimizer(parameter_groups(context.model, config.optimizer), config.optimizer, context.extensions)
    conditions = {  # what decides the result beside the config: the data, and how a batch is cut, for the negatives
        "number of processes": world_size(),
        "micro-batches of each": count_micro_batches(config),
        OPTIMIZER: type(optimizer).__name__,
        DATA: dict(context.digests),
    }
    require_same(conditions)

    def unmeasured(state: TrainingState) -> bool:
        every = config.evaluate_every
        due = every is not None and (state.step == context.max_steps or (every > 0 and state.step % every == 0))
        return due and state.evaluated < state.step

    state = TrainingState()
    if resume:
        state = load_state(out, context.model, optimizer, conditions)
    if state.step > context.max_steps:
        raise ValueError(f"{out} has done {state.step} steps, more than the {context.max_steps} asked for; give more")
    if changed and rank() == 0:
        change()
    if 0 < state.step == context.max_steps and not unmeasured(state):
        logger.info("%s is finished: all %d steps are done", out, state.step)
        _keep_last(context, optimizer, state, out)
        return state.metrics
    factor = schedule(config.optimizer, context.max_steps, context.extensions)
    limited = [name for name in config.task.contrasts if name != "ITC" or config.contrast_over != "step"]
    if limited and count_micro_batches(config) > 1 and rank() == 0:
        logger.warning(
            "%s: one micro-batch of %s pairs per process is compared, not the batch of %s; raise micro_batch_size, "
            "or add processes (for ITC: contrast_over)",
            " and ".join(limited),
            config.micro_batch_size,
            config.batch_size,
        )
    if config.data.trains_on_validation and config.evaluate_every is not None and rank() == 0:
        logger.warning(
            "%s is trained on, so its metrics say nothing about other data: there is no best/, only last/, and no "
            "calibration; leave it out of --data.train-splits, or give another --data.validation-split",
            config.data.validation_split,
        )
    if rank() == 0:
        steps = f"step {state.step + 1:,} to {context.max_steps:,}"
        logger.info("training: %s, %d of %d examples each", steps, config.batch_size, len(context.examples))
    loggers = {**context.extensions.loggers, **LOGGERS}
    log = RunLog(
        out,
        config,
        context.max_steps,
        state,
        loggers=[loggers[name](out, config, state.step) for name in report_to] if rank() == 0 else (),
        enabled=rank() == 0,
        progress=progress,
    )
    watch = StepWatch()
    saver = StateSaver(out, conditions, describe=context.describe, asynchronous=async_checkpoints, timeout=timeout)

    with (
        saver,
        log,
        stop_signals(lambda name: logger.warning("%s: stopping after this step; another ends at once", name)) as stop,
        closing(_batches(context, state.step)) as loader,
    ):
        batches = log.loaded(loader)
        if changed:
            log.write("changed", state.step, changed)
        if unmeasured(state):  # it was stopped before it could
            _evaluate(task, context, optimizer, state, log, saver, out)
        for step in range(state.step, context.max_steps):
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor(step)
            with _counting(log, context, first=step == state.step):
                losses, ids, skipped = run_step(task, context, optimizer, batches, step, state.skipped)
            state.step, state.skipped = step + 1, state.skipped + skipped
            for callback in () if skipped else context.extensions.callbacks:
                callback.after_step(context, optimizer, state.step)
            last = state.step == context.max_steps
            stopping = watch.note(state.step, losses, ids, stop=stop.requested, skipped=skipped)
            shared = mean_over_ranks(losses) if log.due(state.step) else losses
            log.step(state.step, shared, float(optimizer.param_groups[0]["lr"]))
            # Before the evaluation, which may take longer than there is between a signal and the end.
            if last or stopping or unmeasured(state) or state.step % config.checkpoint_every == 0:
                watch.settle()  # what is kept is of finite weights
                with log.pausing("saving"):
                    saver.save(context.model, optimizer, state)
            if stopping and not last:
                raise Interrupted(
                    f"stopped after step {state.step} of {context.max_steps}; --resume continues it",
                    stop.signal or signal.SIGTERM,
                )
            if unmeasured(state):
                _evaluate(task, context, optimizer, state, log, saver, out)
        _keep_last(context, optimizer, state, out)
    return state.metrics


def _batches(context: TrainContext, first_step: int) -> Generator[Batch, None, None]:
    config, micro_batches = context.config, count_micro_batches(context.config)
    kept = keeps_pixels(config, context.model.config.vision.image_size)
    sampler = StepSampler(
        len(context.examples),
        batch_size=config.batch_size,
        micro_batches=micro_batches,
        passes=lambda step: 2 if not kept and encodes_twice(config, step / context.max_steps, micro_batches) else 1,
        counted=lambda step: micro_batches > 1 and config.task.counts_labels(step / context.max_steps),
        steps=range(first_step, context.max_steps),
        seed=config.seed,
        sets=_sets(context),
        rank=rank(),
        world_size=world_size(),
    )
    device = context.model.device
    if context.images is not None:
        # A quarter of the bytes, on the way or kept.
        context.images[0].raw = device.type != "cpu" or (kept and config.contrast_over == "step")
    return load_items(context.examples.__getitem__, sampler, num_workers=config.data.num_workers, device=device)


def _sets(context: TrainContext) -> Tensor | None:
    """Returns the set of each example where batches are of one set each."""
    config = context.config
    if not config.data.one_set_per_batch:
        return None
    numbers = getattr(context.examples, "set_numbers", None)
    if numbers is None:
        raise ValueError(f"the examples of {config.task.kind} have no set_numbers; leave out one_set_per_batch")
    return numbers


def _evaluate(
    task: Replicated,
    context: TrainContext,
    optimizer: Optimizer,
    state: TrainingState,
    log: RunLog,
    saver: StateSaver,
    out: Path,
) -> None:
    """Measures the model and keeps it if it is the best so far; the state that is saved already learns of both."""
    config, device = context.config, context.model.device
    # Weights that are shared out are put together in the precision of training.
    precision = "fp32" if device.type == "cpu" and config.parallel == "ddp" else config.precision
    with log.pausing("validating"), _as_evaluated(context, optimizer):
        with task.evaluating(), autocast(device, precision):
            # Those of the first process in all of them, as these decide together what is saved.
            state.metrics = from_first(context.evaluate())
        log.write("validation", state.step, state.metrics)
        if config.select_by not in state.metrics:
            raise ValueError(
                f"select_by is {config.select_by!r}; the evaluation gave {sorted(state.metrics)}; the state of step "
                f"{state.step} is saved, and --resume with another --select-by goes on from it"
            )
        score = state.metrics[config.select_by]
        if not config.data.trains_on_validation and (state.best is None or score > state.best):
            state.best, state.best_step = score, state.step
            context.save(out / "best", state.metrics)
        state.evaluated = state.step
        saver.amend(state)


@contextmanager
def _as_evaluated(context: TrainContext, optimizer: Optimizer) -> Iterator[None]:
    with ExitStack() as stack:
        for callback in context.extensions.callbacks:
            stack.enter_context(callback.evaluating(context, optimizer))
        yield


def _keep_last(context: TrainContext, optimizer: Optimizer, state: TrainingState, out: Path) -> None:
    # The config of a checkpoint comes last: with it, last/ already holds the weights of this end.
    if from_first(not (out / "last" / "config.json").exists()):
        with _as_evaluated(context, optimizer):
            context.save(out / "last", state.metrics)


@contextmanager
def _counting(log: RunLog, context: TrainContext, *, first: bool) -> Iterator[None]:
    """Counts the operations of the first step where the log can say which share of the possible speed they are."""
    if not first or peak_flops() is None or context.config.precision != "bf16":
        yield
        return
    # Compiled layers run as they are written; else their operations would not be seen.
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        yield
    log.step_flops = float(counter.get_total_flops())
