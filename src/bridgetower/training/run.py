"""From a run config to a trained model, and the folder of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from bridgetower.checkpoints import Checkpoint
from bridgetower.checkpoints.tensors import SHARDS
from bridgetower.distributed import (
    barrier,
    broadcast_object,
    num_restarts,
    process_group,
    rank,
    require_same,
)
from bridgetower.files import (
    differences,
    intended_name,
    locked,
    read_json,
    remove_folder,
    remove_leftovers,
    write_json,
)
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import look_up
from bridgetower.model.cpu import optimize_for_cpu
from bridgetower.model.extensions import NO_EXTENSIONS, Extensions
from bridgetower.plain import check_choice
from bridgetower.tasks.run_config import (
    CONFIG,
    METRICS,
    TIMEOUT_MINUTES,
    RunConfig,
)
from bridgetower.tasks.spec import TaskSpec
from bridgetower.tasks.table import TASKS, spec_of
from bridgetower.training.data_parallel import run_device, set_numerics
from bridgetower.training.frozen import align_projections, frozen_examples
from bridgetower.training.logs import LOGGERS, TENSORBOARD
from bridgetower.training.optim import (
    OPTIMIZERS,
    SCHEDULES,
)
from bridgetower.training.setup import build_task, starting_checkpoint, with_classes
from bridgetower.training.state import (
    CHECKPOINT_FILES,
    FOLDER,
    newest,
)
from bridgetower.training.step import check_batch_size
from bridgetower.training.trainer import Trainer

CHECKPOINTS = ("best", "last")
FEATURES = "features"

_FIXED = ("task.kind", "model.")
"""Values of a config that a resumed run may not change, except for dropout."""

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
    progress: bool = True,
) -> dict[str, float]:
    """Trains a model and writes everything to the folder `out`.

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
            `features` in `out`, which is removed when the run is done.
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
    # Check what needs no file.
    out = Path(out)
    look_up("optimizer.rule", config.optimizer.rule, OPTIMIZERS | extensions.optimizers)
    look_up("optimizer.schedule", config.optimizer.schedule, SCHEDULES | extensions.schedules)
    for name in report_to:
        look_up("report_to", name, LOGGERS | extensions.loggers)
    check_choice(
        "select_by", config.select_by, Literal[(*config.task.metrics, *extensions.metrics)]
    )
    spec = spec_of(config.task, task)
    cache = feature_cache or out / FEATURES

    with process_group(config.device, timeout_minutes):
        # Check the data before anything is loaded or written.
        if task is None:
            check_batch_size(config, spec.count_examples(config.data))
        config = with_classes(config, spec)
        arguments = {"out": str(out), "resume": resume, "feature_cache": str(cache)}
        require_same({**arguments, **config.to_dict()})

        resume = broadcast_object((resume or num_restarts() > 0) and (out / CONFIG).exists())
        with _held_folder(out, config, spec, resume=resume) as previous:
            if rank() == 0:
                logger.info("%s: starting the run in %s", config.recipe or "train", out)
                folders = " and ".join(config.data.folders) or "the data"
                logger.info("building the model, and reading %s", folders)

            # Read the checkpoint; its patches may not divide the image size of a recipe.
            checkpoint = starting_checkpoint(config, spec, extensions)
            if config.image_size is not None:
                config = replace(config, image_size=checkpoint.config.vision.image_size)
            if rank() == 0 and not resume:
                write_json(out / CONFIG, config.to_dict())

            # Build the model and its task, which may leave examples out.
            context = build_task(config, checkpoint, build_model(config, checkpoint), spec)
            check_batch_size(config, len(context.examples))
            del checkpoint  # on a GPU, its tensors are a second copy
            if config.freeze_towers:
                examples = frozen_examples(context, cache, progress=progress)
                context = replace(context, examples=examples)
            # A saved state has the aligned projections.
            if config.align_first and not broadcast_object(newest(out) is not None):
                align_projections(context, progress=progress)

            trainer = Trainer(
                context,
                out,
                resume=resume,
                async_checkpoints=async_checkpoints,
                timeout=timedelta(minutes=timeout_minutes),
                report_to=report_to,
                changed=_changes(previous, config) if resume else {},
                progress=progress,
            )
            metrics = trainer.run()
            barrier()
            if rank() == 0 and (out / FEATURES).exists():
                remove_folder(out / FEATURES)
            return metrics


@contextmanager
def _held_folder(
    out: Path, config: RunConfig, spec: TaskSpec, *, resume: bool
) -> Iterator[RunConfig]:
    """Locks the folder of a run in the first process, and yields the config that the run had, of the same model."""
    with ExitStack() as stack:
        previous = config
        if rank() == 0:
            _check_folder(out, spec, resume=resume)
            stack.enter_context(locked(out))
            # Again, now that no other process can change it.
            _check_folder(out, spec, resume=resume)
            for name in ("", FOLDER, *CHECKPOINTS):
                remove_leftovers(out / name)
            if resume:
                previous = read_run(out, spec)
        previous = broadcast_object(previous)
        changes = ", ".join(
            f"{name} {change}"
            for name, change in _changes(previous, config).items()
            if name.startswith(_FIXED) and not name.endswith("dropout")
        )
        if changes:
            raise ValueError(
                f"{out} is a run of another model or task: {changes}; resume it with the values of before, or start "
                "again in another folder"
            )
        yield previous


def _check_folder(out: Path, spec: TaskSpec, *, resume: bool) -> None:
    """Refuses a folder with files that the run would overwrite."""
    if resume:
        read_run(out, spec)
        for name in CHECKPOINTS:
            if foreign := _foreign_files(out / name, SHARDS, *CHECKPOINT_FILES):
                raise FileExistsError(
                    f"{out / name / foreign[0]} was not written by the run; move it away, as the folder is written anew"
                )
    elif not (out / CONFIG).exists():
        if foreign := _foreign_files(out, CONFIG, ".lock"):
            raise FileExistsError(
                f"{out} already holds a run without its {CONFIG}, or other files ({', '.join(foreign[:3])}); choose "
                "another --out or move them away"
            )
    else:  # a run that failed before its first step may be started anew
        is_saved = newest(out) is not None or any((out / name).exists() for name in CHECKPOINTS)
        if is_saved or ((out / METRICS).exists() and (out / METRICS).stat().st_size > 0):
            raise FileExistsError(
                f"{out} already holds a run; continue it with --resume or choose another --out"
            )


def _foreign_files(folder: Path, *patterns: str) -> list[str]:
    """Returns names that match no pattern. A half-written file has the name that it was to get."""
    names = {intended_name(path) for path in folder.iterdir()} if folder.exists() else ()
    return sorted(name for name in names if not any(fnmatch(name, pattern) for pattern in patterns))


def read_run(out: Path, task: TaskSpec | None = None) -> RunConfig:
    """Returns the config of the run in a folder."""
    if not (out / CONFIG).exists():
        raise FileNotFoundError(
            f"{out} holds no run ({CONFIG} is missing); start one without --resume"
        )
    configs = {spec.name: spec.config for spec in TASKS.values()}
    if task is not None:
        configs[task.name] = task.config
    return RunConfig.from_dict(read_json(out / CONFIG), configs)


def _changes(previous: RunConfig, config: RunConfig) -> dict[str, str]:
    """Returns old and new values by name."""
    unequal = differences(previous.to_dict(), config.to_dict())
    return {name: f"{old} -> {new}" for name, old, new in unequal}


def build_model(config: RunConfig, checkpoint: Checkpoint) -> BridgeTower:
    """Builds the model in training mode on the device of this process."""
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
    return model
