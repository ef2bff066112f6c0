"""From a run config to a trained model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

from bridgetower.checkpoints.io import write_description
from bridgetower.data.frozen import FeatureCache
from bridgetower.distributed import barrier, from_first, num_restarts, process_group, rank, require_same
from bridgetower.files import cache_folder
from bridgetower.model.config import entry
from bridgetower.model.cpu import optimize_for_cpu
from bridgetower.model.extensions import NO_EXTENSIONS, Extensions
from bridgetower.model.plain import check_choice
from bridgetower.tasks.run_config import CONFIG, FEATURE_CACHE_GIB, TIMEOUT_MINUTES, RunConfig
from bridgetower.tasks.spec import TaskSpec
from bridgetower.tasks.table import spec_of
from bridgetower.training.alignment import align_projections
from bridgetower.training.data_parallel import run_device, set_numerics
from bridgetower.training.folder import claimed, save_checkpoint
from bridgetower.training.frozen import frozen_examples
from bridgetower.training.logs import LOGGERS, TENSORBOARD
from bridgetower.training.loop import fit
from bridgetower.training.optim import OPTIMIZERS, SCHEDULES
from bridgetower.training.setup import TrainContext, build_task
from bridgetower.training.start import starting_checkpoint
from bridgetower.training.state import newest

logger = logging.getLogger(__name__)


def train(
    config: RunConfig,
    out: Path,
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
    if feature_cache_limit < 0:
        raise ValueError(f"feature_cache_limit is {feature_cache_limit}; expected GiB, at least 0")
    entry("optimizer.rule", config.optimizer.rule, OPTIMIZERS | extensions.optimizers)
    entry("optimizer.schedule", config.optimizer.schedule, SCHEDULES | extensions.schedules)
    for name in report_to:
        entry("report_to", name, LOGGERS | extensions.loggers)
    check_choice("select_by", config.select_by, Literal[(*config.task.metrics, *extensions.metrics)])
    spec = spec_of(config.task, task)
    cache = FeatureCache(feature_cache or cache_folder() / "features", int(feature_cache_limit * 2**30))
    with process_group(config.device, timeout_minutes), cache:
        require_same({"out": str(out), "resume": resume, "feature_cache": str(cache.folder), **config.to_dict()})
        resume = from_first((resume or num_restarts() > 0) and (out / CONFIG).exists())
        own: dict[str, str] = {}
        with claimed(out, config, spec, resume=resume) if rank() == 0 else nullcontext(own) as found:
            changed = from_first(found)
            if rank() == 0:
                logger.info("building the model, and reading %s", " and ".join(config.data.folders) or "the data")
            metrics = fit(
                _prepared(config, spec, out, extensions, cache, progress=progress),
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


def _prepared(
    config: RunConfig, spec: TaskSpec, out: Path, extensions: Extensions, cache: FeatureCache, *, progress: bool
) -> TrainContext:
    checkpoint = starting_checkpoint(config, spec, extensions)
    device = run_device(config.device)
    set_numerics(device, config.precision, deterministic=config.deterministic)
    model = checkpoint.model(copy=False).train().to(device)
    if config.compile:
        model.compile_layers()
    else:
        optimize_for_cpu(model)
    model.checkpoint_activations(config.checkpoint_activations)
    if config.train_top is not None:
        model.train_top_layers(config.train_top)
    checkpoint = replace(checkpoint, tensors={})
    setup = build_task(config, checkpoint, model, spec)
    if config.freeze_towers:
        setup = replace(setup, examples=frozen_examples(config, model, setup, cache, progress=progress))
    if config.align_first and not from_first(newest(out) is not None):  # the state holds what came of it
        align_projections(config, model, setup.examples, progress=progress)
    return TrainContext(
        **vars(setup),
        config=config,
        model=model,
        save=partial(save_checkpoint, config, checkpoint, model),
        max_steps=config.max_steps or (config.max_epochs or 0) * (len(setup.examples) // config.batch_size),
        describe=partial(write_description, checkpoint),
        extensions=extensions,
    )
