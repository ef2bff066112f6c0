"""From a run config to a trained model: guards the folder, starts or continues the loop, writes checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from bridgetower.checkpoints import Checkpoint, update_weights, write_checkpoint
from bridgetower.distributed import from_first, process_group, require_same
from bridgetower.evaluation.retrieval import ITC_WEIGHT
from bridgetower.files import cache_folder, differences, intended_name, locked, read_json, remove_leftovers, write_json
from bridgetower.model.bridgetower import NO_EXTENSIONS, BridgeTower, Extensions
from bridgetower.model.cpu import optimize_for_cpu
from bridgetower.rows import RowCache
from bridgetower.tasks.run_config import FEATURE_CACHE_GIB, RunConfig
from bridgetower.tasks.run_folder import CONFIG, METRICS
from bridgetower.tasks.spec import TaskSpec
from bridgetower.tasks.table import TASKS, spec_of
from bridgetower.training.alignment import align_projections
from bridgetower.training.frozen import frozen_examples
from bridgetower.training.loop import Fabric, fit, make_fabric
from bridgetower.training.setup import TaskSetup, TrainContext, build_task
from bridgetower.training.start import starting_checkpoint
from bridgetower.training.state import FILE as STATE

# What `write_checkpoint` leaves in best/ and last/; nothing else in there is ours.
_CHECKPOINT = {
    *("config.json", "model.safetensors", "carried.safetensors", "processor.json", "tokenizer.json", "labels.json"),
}


def train(
    config: RunConfig,
    out: Path,
    *,
    task: TaskSpec | None = None,
    extensions: Extensions = NO_EXTENSIONS,
    resume: bool = False,
    allow_world_size_change: bool = False,
    feature_cache: Path | None = None,
    feature_cache_limit: float = FEATURE_CACHE_GIB,
    progress: bool = True,
) -> dict[str, float]:
    """Trains a model; everything goes to the folder `out`.

    The folder holds `run.json` (the config), `best/` and `last/` (checkpoints of this package), `last.pt` (what a
    killed run continues from), `metrics.jsonl` and `tensorboard/`.

    Args:
        config: Decides the result. On CPUs, the same config on the same machine with as many threads gives the same
            bits, however often the run was stopped; on GPUs only with PyTorch's deterministic algorithms.
        task: A task of your own; None: the one of `TASKS` that the config names.
        out: Folder of the run; only the first process needs to see it.
        extensions: Towers, bridges and heads of one's own that the config names.
        resume: Continue the run in `out`; its config, its data and the number of processes must be the same.
        allow_world_size_change: Continue with another number of processes. The pairs of a step stay the same, but not
            how they are cut into micro-batches, the negatives and contrast within these, and the draws of dropout.
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
        FloatingPointError: A loss or a gradient is not finite.
    """
    if allow_world_size_change and not resume:
        raise ValueError("allow_world_size_change=True would be ignored without resume=True; leave it out")
    if feature_cache_limit < 0:
        raise ValueError(f"feature_cache_limit is {feature_cache_limit}; expected GiB, at least 0")
    cache = RowCache(feature_cache or cache_folder() / "features", int(feature_cache_limit * 2**30))
    spec = spec_of(config.task, task)
    with process_group(config.device):
        fabric = make_fabric(config)
        require_same({"out": str(out), "resume": resume, "feature_cache": str(cache.folder), **config.to_dict()})
        if fabric.global_rank == 0:
            _check_folder(out, spec, resume=resume)
        with cache, locked(out) if fabric.global_rank == 0 else nullcontext():
            return _train(
                config,
                spec,
                out,
                fabric,
                extensions,
                cache,
                resume=resume,
                allow_world_size_change=allow_world_size_change,
                progress=progress,
            )


def _train(
    config: RunConfig,
    spec: TaskSpec,
    out: Path,
    fabric: Fabric,
    extensions: Extensions,
    cache: RowCache,
    *,
    resume: bool,
    allow_world_size_change: bool,
    progress: bool,
) -> dict[str, float]:
    if fabric.global_rank == 0:
        _claim(config, spec, out, resume=resume)
    fabric.barrier()
    checkpoint = starting_checkpoint(config, spec, extensions)
    model = checkpoint.model().train().to(fabric.device)
    optimize_for_cpu(model)
    model.checkpoint_activations(config.checkpoint_activations)
    if config.train_top is not None:
        model.train_top_layers(config.train_top)
    checkpoint = replace(checkpoint, tensors={})
    setup = build_task(config, checkpoint, model, spec)
    if config.freeze_towers:
        setup = replace(setup, examples=frozen_examples(config, model, setup, cache, fabric, progress=progress))
    if config.align_first and not from_first((out / STATE).exists()):  # the state holds what came of it
        align_projections(config, model, setup.examples, fabric, progress=progress)
    context = _context(config, checkpoint, model, setup)
    metrics = fit(
        context, fabric, out, resume=resume, allow_world_size_change=allow_world_size_change, progress=progress
    )
    # The config of a checkpoint comes last: with it, last/ already holds the weights of this end.
    if fabric.global_rank == 0 and not (out / "last" / "config.json").exists():
        context.save(out / "last", metrics)
    fabric.barrier()
    return metrics


def read_run(out: Path, task: TaskSpec | None = None) -> RunConfig:
    """Returns the config of the run in a folder.

    Args:
        out: Folder of the run.
        task: A task of your own, if the run is of it.

    Raises:
        FileNotFoundError: The folder holds no run.
        ValueError: It is of another task, or damaged.
    """
    if not (out / CONFIG).exists():
        raise FileNotFoundError(f"{out} holds no run ({CONFIG} is missing); start one without --resume")
    specs = [*TASKS.values(), *([] if task is None else [task])]
    return RunConfig.from_dict(read_json(out / CONFIG), {spec.name: spec.config for spec in specs})


def _check_folder(out: Path, spec: TaskSpec, *, resume: bool) -> None:
    """Raises before anything is written if the folder holds what is not of a run, or a run that may not be replaced."""
    if resume:
        read_run(out, spec)
        spoilt = [folder / name for folder in (out / "best", out / "last") for name in _others(folder, _CHECKPOINT)]
        if spoilt:
            raise FileExistsError(
                f"{spoilt[0]} was not written by the run; move it away, as the folder is written anew"
            )
    elif not (out / CONFIG).exists():
        foreign = _others(out, {CONFIG, ".lock"})
        if foreign:
            raise FileExistsError(
                f"{out} already holds a run without its {CONFIG}, or other files ({', '.join(foreign[:3])}); choose "
                "another --out or move them away"
            )
    elif _has_begun(out):
        raise FileExistsError(f"{out} already holds a run; continue it with --resume or choose another --out")


def _others(folder: Path, ours: set[str]) -> list[str]:
    """Names in a folder that are neither ours nor left over from writing one of ours."""
    return sorted({intended_name(path) for path in folder.iterdir()} - ours) if folder.exists() else []


def _has_begun(out: Path) -> bool:
    """Whether a step was done or anything saved; a run that failed before its first step may be started anew."""
    metrics = out / METRICS
    saved = any((out / name).exists() for name in (STATE, "best", "last"))
    return saved or (metrics.exists() and metrics.stat().st_size > 0)


def _claim(config: RunConfig, spec: TaskSpec, out: Path, *, resume: bool) -> None:
    """Writes the config of a new run, or checks that of the run to continue."""
    _check_folder(out, spec, resume=resume)  # again, now that no other process can change it
    for folder in (out, out / "best", out / "last"):
        remove_leftovers(folder)
    if not resume:
        write_json(out / CONFIG, config.to_dict())
        return
    changed = list(differences(read_run(out, spec).to_dict(), config.to_dict()))
    if changed:
        raise ValueError(f"{out} was started with other values of {', '.join(changed)}; resume it with the same config")


def _context(config: RunConfig, checkpoint: Checkpoint, model: BridgeTower, setup: TaskSetup) -> TrainContext:
    def save(folder: Path, metrics: Mapping[str, float]) -> None:
        tensors = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        current = replace(checkpoint, tensors=tensors, itc_weight=metrics.get(ITC_WEIGHT, 0.0))
        if (folder / "config.json").exists():
            update_weights(current, folder)
            return
        for name in _CHECKPOINT:  # without the config, which comes last: a killed run's first write
            (folder / name).unlink(missing_ok=True)
        write_checkpoint(current, folder)

    max_steps = config.max_steps or (config.max_epochs or 0) * (len(setup.examples) // config.batch_size)
    return TrainContext(**vars(setup), config=config, model=model, save=save, max_steps=max_steps)


__all__ = ["STATE", "read_run", "train"]
