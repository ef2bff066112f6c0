"""The folder of a run: what may be there, held for one process, with the config and the checkpoints of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from bridgetower.checkpoints import Checkpoint, Reranking, update_weights, write_checkpoint
from bridgetower.checkpoints.card import CARD, write_card
from bridgetower.checkpoints.tensors import SHARDS, WEIGHTS
from bridgetower.distributed import rank
from bridgetower.files import differences, intended_name, locked, read_json, remove_leftovers, write_json
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.tasks.run_config import RunConfig
from bridgetower.tasks.run_folder import CONFIG, METRICS
from bridgetower.tasks.spec import TaskSpec
from bridgetower.tasks.table import TASKS
from bridgetower.training.data_parallel import whole_weights
from bridgetower.training.state import FOLDER as STATES
from bridgetower.training.state import newest

# What `write_checkpoint` leaves in best/ and last/; nothing else in there is ours.
_CHECKPOINT = {
    *("config.json", *WEIGHTS[:2], "carried.safetensors", "processor.json", "tokenizer.json", "labels.json", CARD),
}

_LENGTHS = {"max_steps", "max_epochs"}
_MEANS = {"data.num_workers", "data.shard_cache", "data.shard_cache_limit"}  # change nothing in the result


@contextmanager
def claimed(out: Path, config: RunConfig, spec: TaskSpec, *, resume: bool) -> Iterator[None]:
    """Holds the folder of a run for this process, with the config of the run in it.

    Args:
        out: The folder.
        config: Of the run.
        spec: Of its task.
        resume: The run is there, and is continued.

    Raises:
        FileNotFoundError: It holds no run and `resume` is True.
        FileExistsError: It holds something else, or a run and `resume` is False, or another process works in it.
        ValueError: The run there has another config.
    """
    _check(out, spec, resume=resume)
    with locked(out):
        _check(out, spec, resume=resume)  # again, now that no other process can change it
        for folder in (out, out / STATES, out / "best", out / "last"):
            remove_leftovers(folder)
        if resume:
            _take_up(out, config, spec)
        else:
            write_json(out / CONFIG, config.to_dict())
        yield


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


def _check(out: Path, spec: TaskSpec, *, resume: bool) -> None:
    """Raises before anything is written if the folder holds what is not of a run, or a run that may not be replaced."""
    if resume:
        read_run(out, spec)
        spoilt = [
            folder / name for folder in (out / "best", out / "last") for name in _others(folder, _CHECKPOINT, SHARDS)
        ]
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


def _others(folder: Path, ours: set[str], pattern: str = "") -> list[str]:
    """Names in a folder that are neither ours, by name or pattern, nor left over from writing one of ours."""
    names = {intended_name(path) for path in folder.iterdir()} - ours if folder.exists() else ()
    return sorted(name for name in names if not fnmatch(name, pattern))


def _has_begun(out: Path) -> bool:
    """Whether a step was done or anything saved; a run that failed before its first step may be started anew."""
    metrics = out / METRICS
    saved = newest(out) is not None or any((out / name).exists() for name in ("best", "last"))
    return saved or (metrics.exists() and metrics.stat().st_size > 0)


def _take_up(out: Path, config: RunConfig, spec: TaskSpec) -> None:
    """Checks that a run goes on as it was started; a finished one may be extended.

    Raises:
        ValueError: It has other values.
    """
    found = differences(read_run(out, spec).to_dict(), config.to_dict())
    changed = [difference for difference in found if difference[0] not in _MEANS]
    if not changed:
        return
    finished = out / "last" / "config.json"
    if all(name in _LENGTHS and new is not None and new > (old or 0) for name, old, new in changed):
        if finished.exists():
            finished.unlink()  # the folder gets other weights at the end
            write_json(out / CONFIG, config.to_dict())
            return
        advice = "finish it with the same values first, then it can be extended"
    else:
        advice = "resume it with the same values"
    values = ", ".join(f"{name} {old} (now {new})" for name, old, new in changed)
    raise ValueError(f"{out} was started with {values}; {advice}")


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, model: BridgeTower, metrics: Mapping[str, float], config: RunConfig
) -> None:
    """Writes the weights of a run as a checkpoint, in the first process; every process has to call it.

    Args:
        folder: Of the checkpoint. If one is there, its weights are replaced.
        checkpoint: All but the weights.
        model: Has the weights.
        metrics: Of the validation split; what it found for reranking is in them.
        config: Of the run, for the model card.
    """
    tensors = whole_weights(model)
    if rank() != 0:
        return
    current = replace(checkpoint, tensors=tensors, reranking=Reranking.from_metrics(metrics))
    if (folder / "config.json").exists():
        update_weights(current, folder)
    else:  # without the config, which comes last: a killed run's first write
        for path in (*(folder / name for name in _CHECKPOINT), *folder.glob(SHARDS)):
            path.unlink(missing_ok=True)
        write_checkpoint(current, folder)
    write_card(
        current,
        folder,
        metrics=metrics,
        data=[place.rstrip("/").rpartition("/")[2] for place in config.data.folders],
        command=f"bridgetower train {config.recipe}  # all settings are in {CONFIG} of the run",
    )
