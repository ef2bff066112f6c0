"""The training loop: steps, evaluations, saved states, and signals that stop it."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType, MappingProxyType

from bridgetower.data.batches.batch import Batch, StepSampler
from bridgetower.distributed import broadcast_object, rank, require_same, world_size
from bridgetower.files import write_json
from bridgetower.model.layers import autocast
from bridgetower.processor import load_items
from bridgetower.tasks.run_config import CONFIG
from bridgetower.training.data_parallel import Replicated, Sharded
from bridgetower.training.logs import TENSORBOARD, RunLog
from bridgetower.training.optim import build_optimizer, parameter_groups, schedule
from bridgetower.training.setup import TrainContext
from bridgetower.training.state import (
    DATA,
    HELD_OUT,
    OPTIMIZER,
    StateSaver,
    TrainingState,
    load_state,
    save_checkpoint,
)
from bridgetower.training.step import (
    StepWatch,
    count_micro_batches,
    encodes_twice,
    keeps_pixels,
    run_step,
)

_MEASURED = ("select_by", "data.validation_split", "evaluation.")
"""Values of a config that decide how `best/` is chosen; scores from before they changed are not compared."""

SAME_SECONDS = 5.0
"""Signals within this many seconds count as one: launchers send theirs to the group, then to each process again."""

logger = logging.getLogger(__name__)


class Trainer:
    """Trains the task of a context. The methods stand in the order in which a run needs them."""

    def __init__(
        self,
        context: TrainContext,
        out: Path,
        *,
        resume: bool,
        async_checkpoints: bool = False,
        timeout: timedelta | None = None,
        report_to: Sequence[str] = (TENSORBOARD,),
        changed: Mapping[str, str] = MappingProxyType({}),
        progress: bool = True,
    ) -> None:
        config = context.config
        extensions = context.model.extensions
        self.context = context
        self.config = config
        self.out = out
        self.changed = changed  # values of the config that a resumed run changes
        self.max_steps = context.max_steps

        self.callbacks = extensions.callbacks
        for callback in self.callbacks:
            callback.prepare(context)
        is_sharded = config.parallel == "fsdp" and world_size() > 1
        self.task = (
            Sharded(context.task, config.precision) if is_sharded else Replicated(context.task)
        )
        groups = parameter_groups(context.model, config.optimizer)
        self.optimizer = build_optimizer(groups, config.optimizer, extensions)
        self.lr_factor = schedule(config.optimizer, self.max_steps, extensions)

        # What decides the result beside the config: the data, and how a batch is cut, for the negatives.
        conditions = {
            "number of processes": world_size(),
            "micro-batches of each": count_micro_batches(config),
            OPTIMIZER: type(self.optimizer).__name__,
            DATA: dict(context.digests),
            HELD_OUT: dict(context.held_out),
        }
        require_same(conditions)
        self.state = TrainingState()
        if resume:
            self.state = load_state(out, context.model, self.optimizer, conditions)
        if self.state.step > self.max_steps:
            raise ValueError(
                f"{out} has done {self.state.step} steps, more than the {self.max_steps} asked for; give more"
            )
        self.saver = StateSaver(
            out,
            conditions,
            checkpoint=context.checkpoint,
            asynchronous=async_checkpoints,
            timeout=timeout,
        )
        self.log = RunLog(context, out, self.state, report_to=report_to, progress=progress)
        self.watch = StepWatch()

    def run(self) -> dict[str, float]:
        """Trains to the end, writes `last/` and returns the last evaluation. A finished run only returns it."""
        if self.changed:
            self._accept_changes()
        if self.state.step > 0 and self._is_done() and not self._needs_evaluation():
            logger.info("%s is finished: %d steps are done", self.out, self.state.step)
            self._save_last()
            return self.state.metrics

        if rank() == 0:
            self._announce()
        announce_stop = partial(
            logger.warning, "%s: stopping after this step; another ends at once"
        )
        with (
            self.saver,
            self.log,
            stop_signals(announce_stop) as signals,
            closing(self._load_batches()) as loader,
        ):
            batches = self.log.loaded(loader)
            if self.changed:
                self.log.write("changed", self.state.step, self.changed)
            if self._needs_evaluation():  # the run was stopped before it could
                self._evaluate()
            while not self._is_done():
                is_stopping = self._step(batches, signals)
                # The state is saved first: an evaluation may take longer than a launcher waits after its signal.
                if is_stopping or self._needs_evaluation() or self._needs_saving():
                    self._save_state()
                if is_stopping and self.state.step < self.max_steps:
                    raise Interrupted(
                        f"stopped after step {self.state.step} of {self.max_steps}; --resume continues it",
                        signals[0] if signals else signal.SIGTERM,
                    )
                if self._needs_evaluation():
                    self._evaluate()
            self._save_last()
        return self.state.metrics

    def _is_done(self) -> bool:
        patience = self.config.patience
        is_stale = patience is not None and self.state.stale >= patience
        return is_stale or self.state.step == self.max_steps

    def _accept_changes(self) -> None:
        """Notes changed values of the config in the run folder."""
        if any(
            name.startswith(_MEASURED) and name != "evaluation.batch_size" for name in self.changed
        ):
            self.state.best = None
            self.state.stale = 0
            # Before the config is written: a run that is killed after that finds nothing changed.
            self.saver.amend(self.state)
        if rank() == 0:
            changes = ", ".join(f"{name} {values}" for name, values in self.changed.items())
            logger.warning("%s goes on with other values: %s", self.out, changes)
            # Without its config, last/ is no checkpoint until the run ends again.
            (self.out / "last" / "config.json").unlink(missing_ok=True)
            write_json(self.out / CONFIG, self.config.to_dict())

    def _announce(self) -> None:
        """Logs what is trained, and warns of settings that do less than they seem to."""
        config = self.config
        limited = [
            name
            for name in config.task.contrasts
            if name != "ITC" or config.contrast_over != "step"
        ]
        if limited and count_micro_batches(config) > 1:
            logger.warning(
                "%s: one micro-batch of %s pairs per process is compared, not the batch of %s; raise micro_batch_size "
                "or start more processes%s",
                " and ".join(limited),
                config.micro_batch_size,
                config.batch_size,
                "; for ITC alone, set contrast_over to step" if "ITC" in limited else "",
            )
        if config.data.trains_on_validation and config.evaluate_every is not None:
            logger.warning(
                "%s is trained on, so its metrics say nothing about other data: there is no best/, only last/, and no "
                "calibration; leave it out of --data.train-splits, or give another --data.validation-split",
                config.data.validation_split,
            )
        weights = list(self.context.model.parameters())
        logger.info(
            "training %s of %s weights: step %s to %s, %d of %d examples each",
            f"{sum(weight.numel() for weight in weights if weight.requires_grad):,}",
            f"{sum(weight.numel() for weight in weights):,}",
            f"{self.state.step + 1:,}",
            f"{self.max_steps:,}",
            config.batch_size,
            len(self.context.examples),
        )

    def _load_batches(self) -> Generator[Batch, None, None]:
        """Loads the micro-batches of this process, from the next step on."""
        context = self.context
        config = self.config
        device = context.model.device
        micro_batches = count_micro_batches(config)

        sets = None
        if config.data.one_set_per_batch:
            sets = getattr(context.examples, "set_numbers", None)
            if sets is None:
                raise ValueError(
                    f"the examples of {config.task.kind} have no set_numbers; leave out one_set_per_batch"
                )

        is_kept = keeps_pixels(config, context.model.config.vision.image_size)

        def count_passes(step: int) -> int:
            is_read_again = not is_kept and encodes_twice(
                config, step / self.max_steps, micro_batches
            )
            return 2 if is_read_again else 1

        def counts_labels(step: int) -> bool:
            return micro_batches > 1 and config.task.counts_labels(step / self.max_steps)

        sampler = StepSampler(
            len(context.examples),
            batch_size=config.batch_size,
            micro_batches=micro_batches,
            passes=count_passes,
            counted=counts_labels,
            steps=range(self.state.step, self.max_steps),
            seed=config.seed,
            sets=sets,
            rank=rank(),
            world_size=world_size(),
        )
        if context.images:
            # Raw pixels are a quarter of the bytes, on the way or kept.
            context.images[0].raw = device.type != "cpu" or (
                is_kept and config.contrast_over == "step"
            )
        return load_items(
            context.examples.__getitem__,
            sampler,
            num_workers=config.data.num_workers,
            device=device,
        )

    def _step(self, batches: Iterator[Batch], signals: Sequence[signal.Signals]) -> bool:
        """Runs the next step, and returns whether a process was asked to stop."""
        state = self.state
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * self.lr_factor(state.step)
        losses, ids, is_skipped = run_step(
            self.task, self.context, self.optimizer, batches, state.step, state.skipped
        )
        state.step += 1
        state.skipped += is_skipped
        if not is_skipped:
            for callback in self.callbacks:
                callback.after_step(self.context, self.optimizer, state.step)
        is_stopping = self.watch.note(
            state.step, losses, ids, stop=bool(signals), skipped=is_skipped
        )
        self.log.step(state.step, losses, float(self.optimizer.param_groups[0]["lr"]))
        return is_stopping

    def _needs_saving(self) -> bool:
        step = self.state.step
        return step == self.max_steps or step % self.config.checkpoint_every == 0

    def _save_state(self) -> None:
        self.watch.settle()  # only finite weights are saved
        with self.log.pausing("saving"):
            self.saver.save(self.context.model, self.optimizer, self.state)

    def _needs_evaluation(self) -> bool:
        return (
            self.context.evaluates_after(self.state.step) and self.state.evaluated < self.state.step
        )

    def _evaluate(self) -> None:
        """Measures the model, writes `best/` if it is the best so far, and adds both to the saved state."""
        config = self.config
        state = self.state
        device = self.context.model.device
        # FSDP gathers weights in the precision of training.
        is_exact = device.type == "cpu" and config.parallel == "ddp"
        with self.log.pausing("validating"), self._callbacks_evaluating():
            with (
                self.task.evaluating(),
                autocast(device, "fp32" if is_exact else config.precision),
            ):
                # Every process gets the metrics of the first, as they decide together what is saved.
                state.metrics = broadcast_object(self.context.evaluate())
            self.log.write("validation", state.step, state.metrics)
            if config.select_by not in state.metrics:
                raise ValueError(
                    f"select_by is {config.select_by!r}; the evaluation gave {sorted(state.metrics)}; the state of "
                    f"step {state.step} is saved, and --resume with another --select-by goes on from it"
                )
            score = state.metrics[config.select_by]
            is_best = not config.data.trains_on_validation and (
                state.best is None or score > state.best
            )
            if rank() == 0:
                logger.info(
                    "step %d: %s %.4g on %s%s",
                    state.step,
                    config.select_by,
                    score,
                    config.data.validation_split,
                    ", the best so far" if is_best else "",
                )
            state.stale += 1
            if is_best:
                state.best = score
                state.stale = 0
                save_checkpoint(self.context, self.out / "best", state.metrics)
            if self._is_done() and state.step < self.max_steps and rank() == 0:
                logger.info("stopping early: the last %d evaluations were not better", state.stale)
            state.evaluated = state.step
            self.saver.amend(state)

    def _save_last(self) -> None:
        """Writes `last/` unless it has the weights of this end: its config, which is written last, tells."""
        if broadcast_object(not (self.out / "last" / "config.json").exists()):
            with self._callbacks_evaluating():
                save_checkpoint(self.context, self.out / "last", self.state.metrics)

    @contextmanager
    def _callbacks_evaluating(self) -> Iterator[None]:
        with ExitStack() as stack:
            for callback in self.callbacks:
                stack.enter_context(callback.evaluating(self.context, self.optimizer))
            yield


class Interrupted(Exception):  # noqa: N818 - not an error: the run was stopped by a signal
    """The run saved its state and stopped because of `signal`, which is SIGTERM if another process got it."""

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.signal = number


@contextmanager
def stop_signals(
    announce: Callable[[str], None] = lambda name: None,
) -> Iterator[list[signal.Signals]]:
    """Lists the first signal, which asks to stop, and announces its name. A later one ends the process."""
    received = list[signal.Signals]()
    received_at = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal received_at
        if not received:
            received.append(signal.Signals(number))
            received_at = time.monotonic()
            announce(received[0].name)
        elif time.monotonic() - received_at > SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    # Python handles signals in the main thread only. A signal that is ignored stays so, as SIGHUP is below nohup.
    previous = {
        number: signal.signal(number, handle)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if current_thread() is main_thread() and signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
