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
from torch.utils.flop_counter import FlopCounterMode

from bridgetower.data.batch import Batch, StepSampler
from bridgetower.distributed import from_first, rank, require_same, world_size
from bridgetower.files import write_json
from bridgetower.model.layers import autocast
from bridgetower.processor import load_items
from bridgetower.tasks.run_config import CONFIG
from bridgetower.training.data_parallel import Replicated, Sharded
from bridgetower.training.logs import LOGGERS, TENSORBOARD, RunLog, mean_over_ranks, peak_flops
from bridgetower.training.optim import build_optimizer, parameter_groups, schedule
from bridgetower.training.setup import TrainContext
from bridgetower.training.state import DATA, OPTIMIZER, StateSaver, TrainingState, load_state
from bridgetower.training.step import StepWatch, count_micro_batches, encodes_twice, keeps_pixels, run_step

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_SECONDS = 5.0
"""Within which signals are one request: launchers send theirs to the group, and then to each process again."""


class Interrupted(Exception):  # noqa: N818 - not an error: the run was stopped by a signal
    """The run was stopped by `signal`, SIGTERM if that came to another process, and saved its state."""

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.signal = number


class Stop:
    """Whether the run has to stop, and which signal asked first."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.signal: signal.Signals | None = None
        self._announce, self._since = announce, 0.0

    @property
    def requested(self) -> bool:
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
    """Turns signals into a request; outside the main thread, where Python takes none, none is awaited."""
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
    progress: bool = True,
) -> dict[str, float]:
    """Trains to the end, writes `last/` and returns the last evaluation; a finished run only returns it."""
    config, model, extensions = context.config, context.model, context.extensions
    shared_out = config.parallel == "fsdp" and world_size() > 1
    task = Sharded(context.task, config.precision) if shared_out else Replicated(context.task)
    optimizer = build_optimizer(parameter_groups(model, config.optimizer), config.optimizer, extensions)
    conditions = {  # what decides the result beside the config: the data, and how a batch is cut, for the negatives
        "number of processes": world_size(),
        "micro-batches of each": count_micro_batches(config),
        OPTIMIZER: type(optimizer).__name__,
        DATA: dict(context.digests),
    }
    require_same(conditions)
    state = load_state(out, model, optimizer, conditions) if resume else TrainingState()
    if state.step > context.max_steps:
        raise ValueError(f"{out} has done {state.step} steps, more than the {context.max_steps} asked for; give more")
    if changed and rank() == 0:
        (out / "last" / "config.json").unlink(missing_ok=True)  # it is none of its checkpoints until it ends again
        write_json(out / CONFIG, config.to_dict())

    def unmeasured() -> bool:
        every = config.evaluate_every
        due = every is not None and (state.step == context.max_steps or (every > 0 and state.step % every == 0))
        return due and state.evaluated < state.step

    @contextmanager
    def as_evaluated() -> Iterator[None]:
        with ExitStack() as stack:
            for callback in extensions.callbacks:
                stack.enter_context(callback.evaluating(context, optimizer))
            yield

    def keep_last() -> None:
        # The config of a checkpoint comes last: with it, last/ already holds the weights of this end.
        if from_first(not (out / "last" / "config.json").exists()):
            with as_evaluated():
                context.save(out / "last", state.metrics)

    if 0 < state.step == context.max_steps and not unmeasured():
        logger.info("%s is finished: all %d steps are done", out, state.step)
        keep_last()
        return state.metrics
    if rank() == 0:
        _announce(context, state.step)
    loggers = {**LOGGERS, **extensions.loggers}
    log = RunLog(
        out,
        config,
        context.max_steps,
        state,
        loggers=[loggers[name](out, config, state.step) for name in report_to] if rank() == 0 else (),
        enabled=rank() == 0,
        progress=progress,
    )
    factor, watch = schedule(config.optimizer, context.max_steps, extensions), StepWatch()
    saver = StateSaver(out, conditions, describe=context.describe, asynchronous=async_checkpoints, timeout=timeout)

    def evaluate() -> None:
        """Measures the model and keeps it if it is the best so far; the state that is saved already learns of both."""
        # Weights that are shared out are put together in the precision of training.
        precision = "fp32" if model.device.type == "cpu" and config.parallel == "ddp" else config.precision
        with log.pausing("validating"), as_evaluated():
            with task.evaluating(), autocast(model.device, precision):
                # Those of the first process in all of them, as these decide together what is saved.
                state.metrics = from_first(context.evaluate())
            log.write("validation", state.step, state.metrics)
            if config.select_by not in state.metrics:
                raise ValueError(
                    f"select_by is {config.select_by!r}; the evaluation gave {sorted(state.metrics)}; the state of "
                    f"step {state.step} is saved, and --resume with another --select-by goes on from it"
                )
            score = state.metrics[config.select_by]
            if not config.data.trains_on_validation and (state.best is None or score > state.best):
                state.best, state.best_step = score, state.step
                context.save(out / "best", state.metrics)
            state.evaluated = state.step
            saver.amend(state)

    with (
        saver,
        log,
        stop_signals(lambda name: logger.warning("%s: stopping after this step; another ends at once", name)) as stop,
        closing(_batches(context, state.step)) as loader,
    ):
        batches = log.loaded(loader)
        if changed:
            log.write("changed", state.step, changed)
        if unmeasured():  # it was stopped before it could
            evaluate()
        counts = peak_flops() is not None and config.precision == "bf16"
        for step in range(state.step, context.max_steps):
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor(step)
            with ExitStack() as counting:
                counter = FlopCounterMode(display=False)
                if counts:  # compiled layers run as they are written; else their operations would not be seen
                    counting.enter_context(torch.compiler.set_stance("force_eager"))
                    counting.enter_context(counter)
                losses, ids, skipped = run_step(task, context, optimizer, batches, step, state.skipped)
            if counts:
                log.step_flops, counts = float(counter.get_total_flops()), False
            state.step, state.skipped = step + 1, state.skipped + skipped
            for callback in () if skipped else extensions.callbacks:
                callback.after_step(context, optimizer, state.step)
            last = state.step == context.max_steps
            stopping = watch.note(state.step, losses, ids, stop=stop.requested, skipped=skipped)
            means = mean_over_ranks(losses) if log.due(state.step) else losses
            log.step(state.step, means, float(optimizer.param_groups[0]["lr"]))
            # Before the evaluation, which may take longer than there is between a signal and the end.
            if last or stopping or unmeasured() or state.step % config.checkpoint_every == 0:
                watch.settle()  # what is kept is of finite weights
                with log.pausing("saving"):
                    saver.save(model, optimizer, state)
            if stopping and not last:
                raise Interrupted(
                    f"stopped after step {state.step} of {context.max_steps}; --resume continues it",
                    stop.signal or signal.SIGTERM,
                )
            if unmeasured():
                evaluate()
        keep_last()
    return state.metrics


def _announce(context: TrainContext, first_step: int) -> None:
    config = context.config
    limited = [name for name in config.task.contrasts if name != "ITC" or config.contrast_over != "step"]
    if limited and count_micro_batches(config) > 1:
        logger.warning(
            "%s: one micro-batch of %s pairs per process is compared, not the batch of %s; raise micro_batch_size, "
            "or add processes (for ITC: contrast_over)",
            " and ".join(limited),
            config.micro_batch_size,
            config.batch_size,
        )
    if config.data.trains_on_validation and config.evaluate_every is not None:
        logger.warning(
            "%s is trained on, so its metrics say nothing about other data: there is no best/, only last/, and no "
            "calibration; leave it out of --data.train-splits, or give another --data.validation-split",
            config.data.validation_split,
        )
    steps = f"step {first_step + 1:,} to {context.max_steps:,}"
    logger.info("training: %s, %d of %d examples each", steps, config.batch_size, len(context.examples))


def _batches(context: TrainContext, first_step: int) -> Generator[Batch, None, None]:
    config, micro_batches, device = context.config, count_micro_batches(context.config), context.model.device
    sets = getattr(context.examples, "set_numbers", None) if config.data.one_set_per_batch else None
    if config.data.one_set_per_batch and sets is None:
        raise ValueError(f"the examples of {config.task.kind} have no set_numbers; leave out one_set_per_batch")
    kept = keeps_pixels(config, context.model.config.vision.image_size)
    sampler = StepSampler(
        len(context.examples),
        batch_size=config.batch_size,
        micro_batches=micro_batches,
        passes=lambda step: 2 if not kept and encodes_twice(config, step / context.max_steps, micro_batches) else 1,
        counted=lambda step: micro_batches > 1 and config.task.counts_labels(step / context.max_steps),
        steps=range(first_step, context.max_steps),
        seed=config.seed,
        sets=sets,
        rank=rank(),
        world_size=world_size(),
    )
    if context.images is not None:
        # A quarter of the bytes, on the way or kept.
        context.images[0].raw = device.type != "cpu" or (kept and config.contrast_over == "step")
    return load_items(context.examples.__getitem__, sampler, num_workers=config.data.num_workers, device=device)
