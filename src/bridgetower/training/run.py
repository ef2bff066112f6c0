"""From a run config to a trained model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from bridgetower.data.remote_sets import local_sets
from bridgetower.distributed import barrier, from_first, num_restarts, process_group, rank, require_same
from bridgetower.files import cache_folder
from bridgetower.model.cpu import optimize_for_cpu
from bridgetower.model.extensions import NO_EXTENSIONS, Extensions
from bridgetower.rows import RowCache
from bridgetower.tasks.run_config import FEATURE_CACHE_GIB, TIMEOUT_MINUTES, RunConfig
from bridgetower.tasks.run_folder import CONFIG
from bridgetower.tasks.spec import TaskSpec
from bridgetower.tasks.table import spec_of
from bridgetower.training.alignment import align_projections
from bridgetower.training.data_parallel import run_device, set_numerics
from bridgetower.training.folder import claimed, save_checkpoint
from bridgetower.training.frozen import frozen_examples
from bridgetower.training.loop import fit
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
    allow_world_size_change: bool = False,
    async_checkpoints: bool = False,
    timeout_minutes: float = TIMEOUT_MINUTES,
    feature_cache: Path | None = None,
    feature_cache_limit: float = FEATURE_CACHE_GIB,
    progress: bool = True,
) -> dict[str, float]:
    """Trains a model; everything goes to the folder `out`.

    The folder holds `run.json` (the config), `best/` and `last/` (checkpoints of this package), `states/` (what a
    killed run continues from), `metrics.jsonl` and `tensorboard/`.

    Args:
        config: Decides the result. On CPUs, the same config on the same machine with as many threads gives the same
            bits, however often the run was stopped; on GPUs only with PyTorch's deterministic algorithms.
        task: A task of your own; None: the one of `TASKS` that the config names.
        out: Folder of the run; only the first process needs to see it.
        extensions: Towers, bridges and heads of one's own that the config names.
        resume: Continue the run in `out`; its config, its data and the number of processes must be the same. A finished
            run may get more `max_steps` or `max_epochs`, and goes on as a run of that length would from there.
            Processes that torchrun starts again after a failure continue in any case.
        allow_world_size_change: Continue with another number of processes. The examples of a step stay the same, but
            not how they are cut into micro-batches, the contrast within these, and all that is drawn for each:
            negatives, captions, masked and dropped words, augmentation and dropout.
        async_checkpoints: Write what a killed run continues from while the run goes on, from a copy on the CPU.
        timeout_minutes: How long a process waits for the others.
        feature_cache: Folder for the hidden states of frozen towers, which runs share and all processes see; None:
            `features` in the cache folder of the user.
        feature_cache_limit: GiB up to which features that no run uses are kept, the last used ones first.
        progress: Show a progress bar.

    Returns:
        Metrics of the last evaluation; a finished run is left as it is.

    Raises:
        FileNotFoundError: `out` holds no run and `resume` is True.
        FileExistsError: `out` holds something else, or it holds a run and `resume` is False.
        ValueError: `resume` with another config, with data that were prepared anew or with another number of
            processes; processes that differ in their arguments or data; data that does not fit; or a model setting that
            `init` would ignore.
        OSError: The disk has no room, such as for the features of frozen towers.
        ConnectionError: Another process was lost; it is named.
        FloatingPointError: A loss or a gradient is not finite.
    """
    if allow_world_size_change and not resume and not dist.is_torchelastic_launched():
        raise ValueError("allow_world_size_change=True would be ignored without resume=True; leave it out")
    if feature_cache_limit < 0:
        raise ValueError(f"feature_cache_limit is {feature_cache_limit}; expected GiB, at least 0")
    spec = spec_of(config.task, task)
    cache = RowCache(feature_cache or cache_folder() / "features", int(feature_cache_limit * 2**30))
    with process_group(config.device, timeout_minutes), cache:
        require_same({"out": str(out), "resume": resume, "feature_cache": str(cache.folder), **config.to_dict()})
        resume = from_first(resume or (num_restarts() > 0 and (out / CONFIG).exists()))
        with claimed(out, config, spec, resume=resume) if rank() == 0 else nullcontext():
            barrier()
            if rank() == 0:
                logger.info("building the model, and reading %s", " and ".join(config.data.folders) or "the data")
            with local_sets(config.data, (*config.data.train_splits, config.data.validation_split)) as data:
                context = _prepared(replace(config, data=data), spec, out, extensions, cache, progress=progress)
                metrics = fit(
                    context,
                    out,
                    resume=resume,
                    allow_world_size_change=allow_world_size_change,
                    async_checkpoints=async_checkpoints,
                    progress=progress,
                )
            # The config of a checkpoint comes last: with it, last/ already holds the weights of this end.
            if from_first(not (out / "last" / "config.json").exists()):
                context.save(out / "last", metrics)
            barrier()
            return metrics


def _prepared(
    config: RunConfig,
    spec: TaskSpec,
    out: Path,
    extensions: Extensions,
    cache: RowCache,
    *,
    progress: bool,
) -> TrainContext:
    """Returns the model to train, with its task and examples; features of frozen towers are computed."""
    checkpoint = starting_checkpoint(config, spec, extensions)
    device = run_device(config.device)
    set_numerics(device, config.precision, deterministic=config.deterministic)
    model = checkpoint.model(copy=False).train().to(device)
    if config.compile:
        from bridgetower.model.compiling import compile_layers  # which imports PyTorch's compiler

        compile_layers(model)
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
    max_steps = config.max_steps or (config.max_epochs or 0) * (len(setup.examples) // config.batch_size)

    def save(folder: Path, metrics: Mapping[str, float]) -> None:
        save_checkpoint(folder, checkpoint, model, metrics, config)

    return TrainContext(**vars(setup), config=config, model=model, save=save, max_steps=max_steps)
