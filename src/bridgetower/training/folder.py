"""The folder of a run: what may be there, held for one process, with the config and the checkpoints of the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from bridgetower.checkpoints import Checkpoint, Reranking, update_weights, write_checkpoint
from bridgetower.checkpoints.io import CARD, write_card
from bridgetower.checkpoints.tensors import SHARDS, WEIGHTS
from bridgetower.distributed import rank
from bridgetower.files import differences, intended_name, locked, read_json, remove_leftovers, write_json
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.tasks.run_config import CONFIG, METRICS, RunConfig
from bridgetower.tasks.spec import TaskSpec
from bridgetower.tasks.table import TASKS
from bridgetower.training.state import FOLDER as STATES
from bridgetower.training.state import newest

logger = logging.getLogger(__name__)

# What `write_checkpoint` leaves in best/ and last/; nothing else in there is ours.
_CHECKPOINT = {
    *("config.json", *WEIGHTS[:2], "carried.safetensors", "processor.json", "tokenizer.json", "labels.json", CARD),
}

_WHAT_IT_IS = ("task.kind", "model.")
"""Values of a config with which a run has to go on; of the model its dropout and what makes no tensors may change."""


@contextmanager
def claimed(out: Path, config: RunConfig, spec: TaskSpec, *, resume: bool) -> Iterator[dict[str, str]]:
    """Holds the folder of a run for this process, with the config of the run in it; gives what of it has changed."""
    _check(out, spec, resume=resume)
    with locked(out):
        _check(out, spec, resume=resume)  # again, now that no other process can change it
        for folder in (out, out / STATES, out / "best", out / "last"):
            remove_leftovers(folder)
        if not resume:
            write_json(out / CONFIG, config.to_dict())
            yield {}
            return
        found = differences(read_run(out, spec).to_dict(), config.to_dict())
        changed = {name: f"{old} -> {new}" for name, old, new in found}
        others = [name for name in changed if name.startswith(_WHAT_IT_IS) and not name.endswith("dropout")]
        if others:
            values = ", ".join(f"{name} {changed[name]}" for name in others)
            raise ValueError(
                f"{out} is a run of another model or task: {values}; resume it with the values of before, or start "
                "again in another folder"
            )
        if changed:
            logger.warning("%s goes on with other values: %s", out, ", ".join(f"{n} {v}" for n, v in changed.items()))
        yield changed


def read_run(out: Path, task: TaskSpec | None = None) -> RunConfig:
    if not (out / CONFIG).exists():
        raise FileNotFoundError(f"{out} holds no run ({CONFIG} is missing); start one without --resume")
    specs = [*TASKS.values(), *([] if task is None else [task])]
    return RunConfig.from_dict(read_json(out / CONFIG), {spec.name: spec.config for spec in specs})


def _check(out: Path, spec: TaskSpec, *, resume: bool) -> None:
    if resume:
        read_run(out, spec)
        for folder in (out / "best", out / "last"):
            if others := _others(folder, _CHECKPOINT, SHARDS):
                raise FileExistsError(
                    f"{folder / others[0]} was not written by the run; move it away, as the folder is written anew"
                )
    elif not (out / CONFIG).exists():
        if foreign := _others(out, {CONFIG, ".lock"}):
            raise FileExistsError(
                f"{out} already holds a run without its {CONFIG}, or other files ({', '.join(foreign[:3])}); choose "
                "another --out or move them away"
            )
    else:  # a run that failed before its first step may be started anew
        metrics = out / METRICS
        saved = newest(out) is not None or any((out / name).exists() for name in ("best", "last"))
        if saved or (metrics.exists() and metrics.stat().st_size > 0):
            raise FileExistsError(f"{out} already holds a run; continue it with --resume or choose another --out")


def _others(folder: Path, ours: set[str], pattern: str = "") -> list[str]:
    """Names in a folder that are neither ours nor left over from writing one of ours."""
    names = {intended_name(path) for path in folder.iterdir()} - ours if folder.exists() else ()
    return sorted(name for name in names if not fnmatch(name, pattern))


def save_checkpoint(
    config: RunConfig, checkpoint: Checkpoint, model: BridgeTower, folder: Path, metrics: Mapping[str, float]
) -> None:
    """Every process has to call it; the first one writes."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # of what a process has a share
        if rank() == 0:
            tensors[name] = whole.cpu()
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
