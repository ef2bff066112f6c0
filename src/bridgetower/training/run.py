"""From a run config to a trained model: what may be in its folder, and the loop that evaluates, saves and stops."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from fnmatch import fnmatch
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType, MappingProxyType
from typing import Literal

from bridgetower.checkpoints.tensors import SHARDS
from bridgetower.data.batches.batch import Batch, StepSampler
from bridgetower.data.batches.frozen import FeatureCache
from bridgetower.distributed import (
    barrier,
    from_first,
    num_restarts,
    process_group,
    rank,
    require_same,
    world_size,
)
from bridgetower.files import (
    cache_folder,
    differences,
    intended_name,
    locked,
    read_json,
    remove_leftovers,
    write_json,
)
from bridgetower.model.config import entry
from bridgetower.model.cpu import optimize_for_cpu
from bridgetower.model.extensions import NO_EXTENSIONS, Extensions
from bridgetower.model.layers import autocast
from bridgetower.plain import check_choice
from bridgetower.processor import load_items
from bridgetower.tasks.run_config import (
    CONFIG,
    FEATURE_CACHE_GIB,
    METRICS,
    TIMEOUT_MINUTES,
    RunConfig,
)
from bridgetower.tasks.spec import TaskSpec
from bridgetower.tasks.table import TASKS, spec_of
from bridgetower.training.data_parallel import Replicated, Sharded, run_device, set_numerics
from bridgetower.training.frozen import align_projections, frozen_examples
from bridgetower.training.logs import LOGGERS, TENSORBOARD, RunLog
from bridgetower.training.optim import (
    OPTIMIZERS,
    SCHEDULES,
    build_optimizer,
    parameter_groups,
    schedule,
)
from bridgetower.training.setup import TrainContext, build_task, starting_checkpoint, with_classes
from bridgetower.training.state import (
    CHECKPOINT_FILES,
    DATA,
    FOLDER,
    HELD_OUT,
    OPTIMIZER,
    StateSaver,
    TrainingState,
    load_state,
    newest,
    save_checkpoint,
)
from bridgetower.training.step import (
    StepWatch,
    check_batch_size,
    count_micro_batches,
    encodes_twice,
    keeps_pixels,
    run_step,
)

CHECKPOINTS = ("best", "last")

_WHAT_IT_IS = ("task.kind", "model.")
"""Values of a config with which a run has to go on; of the model its dropout and what makes no tensors may change."""

_MEASURED = ("select_by", "data.validation_split", "evaluation.")
"""Values of a config that decide what the figure of `best/` is; those of another figure are not compared with it."""

SAME_SECONDS = 5.0
"""Within which signals are one request: launchers send theirs to the group, and then to each process again."""

logger = logging.getLogger(__name__)


def train(
    config: RunConfig,
    out: str | Path,
    *,
    task: TaskSpec | None = None,
    extensions: Extensions = NO_EXTENSIONS,
    resume: bool = False,
    async_checkpoints: bool = False,
    report_to: Sequence[str] = (TENSORBOARD,),
    timeout_minutes: float = TIMEOUT_MINUTES,
    feature_cache: Path | None = None,
    feature_cache_limit: float = FEATURE_CACHE_GIB,
    progress: bool = True,
) -> dict[str, float]:
    """Trains a model; everything goes to the folder `out`.

    The folder holds `run.json` (the config), `best/` and `last/` (checkpoints of this package), `states/` (what a
    killed run continues from), `metrics.jsonl` and `tensorboard/`. In a thread that is not the main one, signals are
    left alone.

    Args:
        config: Decides the result. On CPUs, the same config on the same machine with as many threads gives the same
            bits, however often the run was stopped; on GPUs only with PyTorch's deterministic algorithms.
        task: A custom task; None: the one of `TASKS` that the config names.
        out: Folder of the run; only the first process needs to see it.
        extensions: Custom towers, bridges, heads, objectives, optimisers, schedules and loggers that are named, and
            metrics and callbacks.
        resume: Continue the run in `out`, if there is one. Its model, its task and its data must be the same, by their
            digests; all else may be changed, and the run goes on with it. Processes that torchrun starts again after a
            failure continue in any case.
        async_checkpoints: Write what a killed run continues from while the run goes on, from a copy on the CPU.
        report_to: Where metrics go beside `metrics.jsonl`: `tensorboard`, `wandb`, `trackio`, `mlflow`, or loggers of
            the extensions.
        timeout_minutes: How long a process waits for the others.
        feature_cache: Folder for the hidden states of frozen towers, which runs share and all processes see; None:
            `features` in the cache folder of the user.
        feature_cache_limit: GiB up to which features that no run uses are kept, the last used ones first.
        progress: Show a progress bar.

    Returns:
        Metrics of the last evaluation; a finished run is left as it is.

    Raises:
        FileExistsError: `out` holds something else, or it holds a run and `resume` is False.
        ValueError: `resume` with another model, task or data; processes that differ in their arguments or data; data
            that does not fit; or a model setting that `init` would ignore.
        OSError: The disk has no room, such as for the features of frozen towers.
        ConnectionError: Another process was lost; it is named.
        FloatingPointError: A loss or a gradient is not finite, in more steps than may be skipped.
    """
    out = Path(out)
    if feature_cache_limit < 0:
        raise ValueError(f"feature_cache_limit is {feature_cache_limit}; expected GiB, at least 0")
    entry("optimizer.rule", config.optimizer.rule, OPTIMIZERS | extensions.optimizers)
    entry("optimizer.schedule", config.optimizer.schedule, SCHEDULES | extensions.schedules)
    for name in report_to:
        entry("report_to", name, LOGGERS | extensions.loggers)
    check_choice(
        "select_by", config.select_by, Literal[(*config.task.metrics, *extensions.metrics)]
    )
    spec = spec_of(config.task, task)
    cache = FeatureCache(
        feature_cache or cache_folder() / "features", int(feature_cache_limit * 2**30)
    )
    with process_group(config.device, timeout_minutes), cache:
        if task is None:
            check_batch_size(
                config, spec.count_examples(config.data)
            )  # before anything is loaded or written
        config = with_classes(config, spec)
        require_same(
            {
                "out": str(out),
                "resume": resume,
                "feature_cache": str(cache.folder),
                **config.to_dict(),
            }
        )
        resume = from_first((resume or num_restarts() > 0) and (out / CONFIG).exists())
        with (
            claimed(out, config, spec, resume=resume)
            if rank() == 0
            else nullcontext(config) as found
        ):
            before = from_first(found)
            if rank() == 0:
                logger.info("%s: starting the run in %s", config.recipe or "train", out)
                logger.info(
                    "building the model, and reading %s",
                    " and ".join(config.data.folders) or "the data",
                )
            checkpoint = starting_checkpoint(config, spec, extensions)
            if (
                config.image_size is not None
            ):  # instead of a recipe's, which the patches of `init` may not divide
                config = replace(config, image_size=checkpoint.config.vision.image_size)
            changed = _changed(before, config) if resume else {}
            if rank() == 0 and not resume:
                write_json(out / CONFIG, config.to_dict())
            device = run_device(config.device)
            set_numerics(device, config.precision, deterministic=config.deterministic)
            model = checkpoint.model(copy=False).train().to(device)
            if config.compiles(device.type):
                if rank() == 0:
                    logger.info(
                        "layers are compiled in the first steps, for minutes; --compile no leaves it out"
                    )
                model.compile_layers(strict=config.compile == "yes")
            else:
                optimize_for_cpu(model)
            model.checkpoint_activations(config.checkpoint_activations)
            if config.train_top is not None:
                model.train_top_layers(config.train_top)
            context = build_task(config, checkpoint, model, spec)
            check_batch_size(
                config, len(context.examples)
            )  # of which the task may have left some out
            del checkpoint  # on a GPU, its tensors are a second copy
            if config.freeze_towers:
                context = replace(
                    context, examples=frozen_examples(context, cache, progress=progress)
                )
            if config.align_first and not from_first(
                newest(out) is not None
            ):  # the state holds what came of it
                align_projections(context, progress=progress)
            metrics = fit(
                context,
                out,
                resume=resume,
                async_checkpoints=async_checkpoints,
                timeout=timedelta(minutes=timeout_minutes),
                report_to=report_to,
                changed=changed,
                progress=progress,
            )
            barrier()
            return metrics


@contextmanager
def claimed(out: Path, config: RunConfig, spec: TaskSpec, *, resume: bool) -> Iterator[RunConfig]:
    """Holds the folder of a run for this process; gives the config that the run had so far."""
    _check(out, spec, resume=resume)
    with locked(out):
        _check(out, spec, resume=resume)  # again, now that no other process can change it
        for name in ("", FOLDER, *CHECKPOINTS):
            remove_leftovers(out / name)
        before = read_run(out, spec) if resume else config
        changed = _changed(before, config)
        others = [
            name
            for name in changed
            if name.startswith(_WHAT_IT_IS) and not name.endswith("dropout")
        ]
        if others:
            values = ", ".join(f"{name} {changed[name]}" for name in others)
            raise ValueError(
                f"{out} is a run of another model or task: {values}; resume it with the values of before, or start "
                "again in another folder"
            )
        yield before


def _changed(before: RunConfig, now: RunConfig) -> dict[str, str]:
    return {
        name: f"{old} -> {new}" for name, old, new in differences(before.to_dict(), now.to_dict())
    }


def read_run(out: Path, task: TaskSpec | None = None) -> RunConfig:
    """Returns the config of the run in a folder."""
    if not (out / CONFIG).exists():
        raise FileNotFoundError(
            f"{out} holds no run ({CONFIG} is missing); start one without --resume"
        )
    specs = [*TASKS.values(), *([] if task is None else [task])]
    return RunConfig.from_dict(read_json(out / CONFIG), {spec.name: spec.config for spec in specs})


def _check(out: Path, spec: TaskSpec, *, resume: bool) -> None:
    def others(folder: Path, ours: set[str], pattern: str = "") -> list[str]:
        """Names of files that are neither ours nor left over from writing one of ours."""
        names = {intended_name(path) for path in folder.iterdir()} - ours if folder.exists() else ()
        return sorted(name for name in names if not fnmatch(name, pattern))

    if resume:
        read_run(out, spec)
        for name in CHECKPOINTS:
            if foreign := others(out / name, CHECKPOINT_FILES, SHARDS):
                raise FileExistsError(
                    f"{out / name / foreign[0]} was not written by the run; move it away, as the folder is written anew"
                )
    elif not (out / CONFIG).exists():
        if foreign := others(out, {CONFIG, ".lock"}):
            raise FileExistsError(
                f"{out} already holds a run without its {CONFIG}, or other files ({', '.join(foreign[:3])}); choose "
                "another --out or move them away"
            )
    else:  # a run that failed before its first step may be started anew
        saved = newest(out) is not None or any((out / name).exists() for name in CHECKPOINTS)
        if saved or ((out / METRICS).exists() and (out / METRICS).stat().st_size > 0):
            raise FileExistsError(
                f"{out} already holds a run; continue it with --resume or choose another --out"
            )


class Interrupted(Exception):  # noqa: N818 - not an error: the run was stopped by a signal
    """The run was stopped by `signal`, SIGTERM if that came to another process, and saved its state."""

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.signal = number


@contextmanager
def stop_signals(
    announce: Callable[[str], None] = lambda name: None,
) -> Iterator[list[signal.Signals]]:
    """Lists the first signal, which asks to stop, and announces its name; one that comes later ends the process."""
    asked, since = list[signal.Signals](), 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if not asked:
            asked.append(signal.Signals(number))
            since = time.monotonic()
            announce(asked[0].name)
        elif time.monotonic() - since > SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    taken = current_thread() is main_thread()  # elsewhere Python takes none
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if taken else ()
    # A signal that is ignored stays so, as SIGHUP is below nohup.
    previous = {
        number: signal.signal(number, note)
        for number in numbers
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield asked
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
    config, model, extensions = context.config, context.model, context.model.extensions
    for callback in extensions.callbacks:
        callback.prepare(context)
    shared_out = config.parallel == "fsdp" and world_size() > 1
    task = Sharded(context.task, config.precision) if shared_out else Replicated(context.task)
    optimizer = build_optimizer(
        parameter_groups(model, config.optimizer), config.optimizer, extensions
    )
    conditions = {  # what decides the result beside the config: the data, and how a batch is cut, for the negatives
        "number of processes": world_size(),
        "micro-batches of each": count_micro_batches(config),
        OPTIMIZER: type(optimizer).__name__,
        DATA: dict(context.digests),
        HELD_OUT: dict(context.held_out),
    }
    require_same(conditions)
    state = load_state(out, model, optimizer, conditions) if resume else TrainingState()
    if state.step > context.max_steps:
        raise ValueError(
            f"{out} has done {state.step} steps, more than the {context.max_steps} asked for; give more"
        )
    saver = StateSaver(
        out,
        conditions,
        checkpoint=context.checkpoint,
        asynchronous=async_checkpoints,
        timeout=timeout,
    )
    if any(name.startswith(_MEASURED) and name != "evaluation.batch_size" for name in changed):
        state.best = None
        saver.amend(
            state
        )  # first: a run that is killed once its config is written finds nothing changed
    if changed and rank() == 0:
        logger.warning(
            "%s goes on with other values: %s",
            out,
            ", ".join(f"{n} {v}" for n, v in changed.items()),
        )
        (out / "last" / "config.json").unlink(
            missing_ok=True
        )  # it is none of its checkpoints until it ends again
        write_json(out / CONFIG, config.to_dict())

    def unmeasured() -> bool:
        return context.evaluates_after(state.step) and state.evaluated < state.step

    def enter_callbacks(stack: ExitStack) -> None:
        for callback in extensions.callbacks:
            stack.enter_context(callback.evaluating(context, optimizer))

    def keep_last() -> None:
        # The config of a checkpoint comes last: with it, last/ already holds the weights of this end.
        if from_first(not (out / "last" / "config.json").exists()):
            with ExitStack() as stack:
                enter_callbacks(stack)
                save_checkpoint(context, out / "last", state.metrics)

    if 0 < state.step == context.max_steps and not unmeasured():
        logger.info("%s is finished: all %d steps are done", out, state.step)
        keep_last()
        return state.metrics
    limited = [
        name for name in config.task.contrasts if name != "ITC" or config.contrast_over != "step"
    ]
    if rank() == 0 and limited and count_micro_batches(config) > 1:
        logger.warning(
            "%s: one micro-batch of %s pairs per process is compared, not the batch of %s; raise micro_batch_size or "
            "start more processes%s",
            " and ".join(limited),
            config.micro_batch_size,
            config.batch_size,
            "; for ITC alone, set contrast_over to step" if "ITC" in limited else "",
        )
    if rank() == 0 and config.data.trains_on_validation and config.evaluate_every is not None:
        logger.warning(
            "%s is trained on, so its metrics say nothing about other data: there is no best/, only last/, and no "
            "calibration; leave it out of --data.train-splits, or give another --data.validation-split",
            config.data.validation_split,
        )
    if rank() == 0:
        steps = f"step {state.step + 1:,} to {context.max_steps:,}"
        counts = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
        share = f"{sum(count for count, trains in counts if trains):,} of {sum(count for count, _ in counts):,} weights"
        logger.info(
            "training %s: %s, %d of %d examples each",
            share,
            steps,
            config.batch_size,
            len(context.examples),
        )
    held_out = config.data.validation_split
    log = RunLog(context, out, state, report_to=report_to, progress=progress)
    factor, watch = schedule(config.optimizer, context.max_steps, extensions), StepWatch()

    def evaluate() -> None:
        """Measures the model and keeps it if it is the best so far; the state that is saved already learns of both."""
        # Weights that are shared out are put together in the precision of training.
        precision = (
            "fp32" if model.device.type == "cpu" and config.parallel == "ddp" else config.precision
        )
        with log.pausing("validating"), ExitStack() as stack:
            enter_callbacks(stack)
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
            is_best = not config.data.trains_on_validation and (
                state.best is None or score > state.best
            )
            if rank() == 0:
                ending = ", the best so far" if is_best else ""
                logger.info(
                    "step %d: %s %.4g on %s%s",
                    state.step,
                    config.select_by,
                    score,
                    held_out,
                    ending,
                )
            if is_best:
                state.best = score
                save_checkpoint(context, out / "best", state.metrics)
            state.evaluated = state.step
            saver.amend(state)

    with (
        saver,
        log,
        stop_signals(
            lambda name: logger.warning("%s: stopping after this step; another ends at once", name)
        ) as asked,
        closing(_batches(context, state.step)) as loader,
    ):
        batches = log.loaded(loader)
        if changed:
            log.write("changed", state.step, changed)
        if unmeasured():  # it was stopped before it could
            evaluate()
        for step in range(state.step, context.max_steps):
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor(step)
            losses, ids, skipped = run_step(task, context, optimizer, batches, step, state.skipped)
            state.step, state.skipped = step + 1, state.skipped + skipped
            for callback in () if skipped else extensions.callbacks:
                callback.after_step(context, optimizer, state.step)
            last = state.step == context.max_steps
            stopping = watch.note(state.step, losses, ids, stop=bool(asked), skipped=skipped)
            log.step(state.step, losses, float(optimizer.param_groups[0]["lr"]))
            # Before the evaluation, which may take longer than there is between a signal and the end.
            if last or stopping or unmeasured() or state.step % config.checkpoint_every == 0:
                watch.settle()  # what is kept is of finite weights
                with log.pausing("saving"):
                    saver.save(model, optimizer, state)
            if stopping and not last:
                raise Interrupted(
                    f"stopped after step {state.step} of {context.max_steps}; --resume continues it",
                    asked[0] if asked else signal.SIGTERM,
                )
            if unmeasured():
                evaluate()
        keep_last()
    return state.metrics


def _batches(context: TrainContext, first_step: int) -> Generator[Batch, None, None]:
    config, micro_batches, device = (
        context.config,
        count_micro_batches(context.config),
        context.model.device,
    )
    sets = getattr(context.examples, "set_numbers", None) if config.data.one_set_per_batch else None
    if config.data.one_set_per_batch and sets is None:
        raise ValueError(
            f"the examples of {config.task.kind} have no set_numbers; leave out one_set_per_batch"
        )
    kept = keeps_pixels(config, context.model.config.vision.image_size)
    sampler = StepSampler(
        len(context.examples),
        batch_size=config.batch_size,
        micro_batches=micro_batches,
        passes=lambda step: (
            2 if not kept and encodes_twice(config, step / context.max_steps, micro_batches) else 1
        ),
        counted=lambda step: (
            micro_batches > 1 and config.task.counts_labels(step / context.max_steps)
        ),
        steps=range(first_step, context.max_steps),
        seed=config.seed,
        sets=sets,
        rank=rank(),
        world_size=world_size(),
    )
    if context.images:
        # A quarter of the bytes, on the way or kept.
        context.images[0].raw = device.type != "cpu" or (kept and config.contrast_over == "step")
    return load_items(
        context.examples.__getitem__, sampler, num_workers=config.data.num_workers, device=device
    )
