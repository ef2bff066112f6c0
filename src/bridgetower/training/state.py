"""What a run writes: its checkpoints, and states, from which it continues when it was killed; nothing by halves."""

from __future__ import annotations

import filecmp
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor
from torch.optim import Optimizer

from bridgetower.checkpoints import Checkpoint, Reranking, update_weights, write_checkpoint
from bridgetower.checkpoints.io import CARD, write_card, write_description
from bridgetower.checkpoints.tensors import (
    SHARDS,
    WEIGHTS,
    read_about,
    share_file,
    state_tensors,
    write_about,
    write_safetensors,
)
from bridgetower.distributed import from_all, from_first, rank, tensors_from_first, world_size
from bridgetower.files import new_folder
from bridgetower.tasks.run_config import CONFIG
from bridgetower.training.setup import TrainContext

FOLDER = "states"
KEPT = 2  # states

DATA, HELD_OUT, OPTIMIZER = "data", "held-out data", "optimiser"
"""Conditions of a run: digests of its data by path, with which it has to go on, and the class of its optimiser."""

CHECKPOINT_FILES = {
    *(
        "config.json",
        *WEIGHTS[:2],
        "carried.safetensors",
        "processor.json",
        "tokenizer.json",
        "labels.json",
        CARD,
    ),
}
"""What `save_checkpoint` leaves in a folder, beside `SHARDS`."""

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TrainingState:
    """Where a run is; all draws are functions of the seed and the step, so no generator state is kept."""

    step: int = 0
    skipped: int = 0  # steps among them whose gradients were not finite, so that no weight changed
    evaluated: int = 0  # step of the last evaluation
    best: float | None = None  # validation metric so far
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation


def newest(out: Path) -> Path | None:
    """Returns the folder of the last state that a run saved."""
    return max((out / FOLDER).glob("step-*"), default=None)


class StateSaver:
    """Writes states of a run, of which the last two are kept; every process has to use it, and to leave it."""

    def __init__(
        self,
        out: Path,
        conditions: Mapping[str, Any],
        *,
        checkpoint: Checkpoint | None = None,
        asynchronous: bool = False,
        timeout: timedelta | None = None,
    ) -> None:
        self.out, self.conditions, self.checkpoint, self.asynchronous = (
            out,
            conditions,
            checkpoint,
            asynchronous,
        )
        # Of its own: the exchanges of a save in the background must not meet those of the run.
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world_size() > 1 else None
        self._pool, self._pending = ThreadPoolExecutor(1), list[Future[None]]()

    def __enter__(self) -> StateSaver:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()
        self._pool.shutdown()

    def save(self, model: nn.Module, optimizer: Optimizer, state: TrainingState) -> None:
        """Writes a state so that `load_state` gives the same bits; first waits for the one before."""
        self.wait()
        tensors: dict[str, Any] = {
            f"model.{name}": tensor for name, tensor in model.state_dict().items()
        }
        for name, parameter in _parameters(optimizer).items():
            for kind, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor):
                    given = type(value).__name__
                    raise ValueError(
                        f"the optimiser keeps {kind} of {name} as a {given}; keep tensors only"
                    )
                tensors[f"{kind}.{name}"] = value
        own = {}  # the rows of this process, and in the first one what each has whole
        for name, tensor in tensors.items():
            if hasattr(tensor, "to_local") or rank() == 0:
                rows = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                own[name] = rows.detach().to("cpu", copy=self.asynchronous)
        if self.asynchronous:
            self._pending.append(self._pool.submit(self._write, own, asdict(state)))
        else:
            self._write(own, asdict(state))

    def amend(self, state: TrainingState) -> None:
        """Notes in the state that was saved last what was found since, such as metrics, in the first process."""
        self.wait()
        folder = newest(self.out)
        if rank() == 0 and folder is not None:
            write_about(folder, read_about(folder) | {"state": asdict(state)})

    def wait(self) -> None:
        """Waits until everything is written; raises the error of the process where that failed."""
        while self._pending:
            self._pending.pop().result()

    def _write(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Writes a state, which the first process gives its name when it is whole, and removes old ones."""
        with ExitStack() as opened:

            def begin() -> Path:
                folder = opened.enter_context(
                    new_folder(self.out / FOLDER / f"step-{state['step']:08d}")
                )
                if self.checkpoint is not None:
                    write_description(self.checkpoint, folder)
                return folder

            def write() -> bool:
                if tensors:
                    write_safetensors(share_file(folder, rank()), tensors)
                return bool(tensors)

            def finish() -> None:
                absent = [
                    process
                    for process in range(writing)
                    if not share_file(folder, process).exists()
                ]
                if absent:
                    raise FileNotFoundError(
                        f"process {absent[0]} does not write to this {folder}; use a shared disk"
                    )
                write_about(
                    folder, {"state": state, "conditions": self.conditions, "processes": writing}
                )
                opened.close()
                for path in sorted((self.out / FOLDER).glob("step-*"))[:-KEPT]:
                    rmtree(path)

            folder: Any = self._everywhere(begin, first_only=True)[0]
            writing = sum(self._everywhere(write))
            self._everywhere(finish, first_only=True)

    def _everywhere(self, act: Callable[[], Any], *, first_only: bool = False) -> list[Any]:
        """Does something in every process and returns what each found; the error of one is raised in all."""
        try:
            own = None if first_only and rank() > 0 else act()
        except Exception as error:  # noqa: BLE001 - the others have to learn of it
            own = error
        found = from_all(own, self._group)
        for value in found:
            if isinstance(value, Exception):
                raise value
        return found


def load_state(
    out: Path, model: nn.Module, optimizer: Optimizer, conditions: Mapping[str, Any]
) -> TrainingState:
    """Restores weights and optimiser in place; a run without a state yet starts at step 0."""
    about: Any = None
    path = from_first(newest(out) if rank() == 0 else None)
    if path is None:
        return TrainingState()
    if rank() == 0:
        with _readable(path):
            about = read_about(path)
            if TrainingState.__dataclass_fields__.keys() != about["state"].keys():
                raise ValueError(f"it is of another version: {', '.join(about['state'])}")
    about = from_first(about)
    _check_conditions(path, about["conditions"], conditions)
    weights, parameters, tensors = model.state_dict(), _parameters(optimizer), dict[str, Tensor]()
    keeps_moments = about["conditions"][OPTIMIZER] == conditions[OPTIMIZER]
    shared = any(hasattr(weight, "to_local") for weight in weights.values())
    if shared or rank() == 0:
        with _readable(path):
            for key, tensor in state_tensors(path):
                kind, _, name = key.partition(".")
                if kind == "model" or (keeps_moments and name in parameters):
                    like: Any = weights.get(name) if kind == "model" else parameters[name]
                    if (
                        hasattr(like, "to_local") and tensor.shape == like.shape
                    ):  # of which this process has some rows
                        mesh, cut = like.device_mesh, like.placements
                        tensor = distribute_tensor(
                            tensor.to(like.device), mesh, cut, src_data_rank=None
                        )
                    tensors[key] = tensor
    tensors = tensors if shared else tensors_from_first(tensors)
    now = {f"model.{name}": list(weight.shape) for name, weight in weights.items()}
    before = {
        key: list(tensor.shape) for key, tensor in tensors.items() if key.startswith("model.")
    }
    others = [key for key in {**now, **before} if now.get(key) != before.get(key)]
    if others:
        raise ValueError(
            f"{path} is not of this model ({others[0]} was {before.get(others[0])}, now {now.get(others[0])}); "
            "give the options of the model as they were, or start again in another folder"
        )
    model.load_state_dict({name: tensors[f"model.{name}"] for name in weights})
    optimizer.state.clear()
    place = {name: number for number, name in enumerate(parameters)}
    moments = [key.partition(".")[::2] for key in tensors if not key.startswith("model.")]
    for kind, name in sorted(
        moments, key=lambda moment: place[moment[1]]
    ):  # ordered as if it had gone on
        parameter, tensor = parameters[name], tensors[f"{kind}.{name}"]
        device = parameter.device if optimizer.defaults.get("fused") or tensor.ndim else "cpu"
        optimizer.state[parameter][kind] = tensor.to(device)
    return TrainingState(**about["state"])


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{path} is damaged or no state of a run ({error}); remove this folder to continue from the state before, "
            "or start again in another folder"
        ) from error


def _parameters(optimizer: Optimizer) -> dict[str, nn.Parameter]:
    pairs = (zip(group["names"], group["params"], strict=True) for group in optimizer.param_groups)
    return {name: parameter for group in pairs for name, parameter in group}


def _check_conditions(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    old, new = before[DATA], now[DATA]
    if before[HELD_OUT] and now[HELD_OUT]:  # else one of the two does not evaluate
        old, new = old | before[HELD_OUT], new | now[HELD_OUT]
    splits = [  # of sets, which may be moved
        f"{one} was trained on, now {other}"
        for one, other in zip(before[DATA], now[DATA], strict=False)
        if one.rpartition(" (")[2] != other.rpartition(" (")[2]
    ]
    if splits or list(old.values()) != list(new.values()):
        pairs = [
            pair for pair in zip(new.items(), old.values(), strict=False) if pair[0][1] != pair[1]
        ]
        contents = [
            f"content of {place} was {before}, now {after}" for (place, after), before in pairs
        ]
        found = ", ".join(splits + contents)
        raise ValueError(
            f"{path} is of other data: {found or f'{len(old)} files, now {len(new)}'}; put them back as they were, or "
            "start again in another folder with --init on this one"
        )
    names = [name for name in now if name not in (DATA, HELD_OUT) and before.get(name) != now[name]]
    if names and rank() == 0:
        logger.warning(
            "%s goes on to another result than that of an undisturbed run: %s. The examples of a step stay the same; "
            "the micro-batches they are cut into, the contrast within these, and all that is drawn for them "
            "(negatives, captions, masked and dropped words, augmentation, dropout) may not, and another optimiser "
            "starts without moments",
            path,
            "; ".join(f"{name} was {before.get(name)}, now {now[name]}" for name in names),
        )


def save_checkpoint(context: TrainContext, folder: Path, metrics: Mapping[str, float]) -> None:
    """Every process has to call it; the first one writes."""
    tensors = {}
    for name, tensor in context.model.state_dict().items():
        whole = (
            tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        )  # of what a process has a share
        if rank() == 0:
            tensors[name] = whole.cpu()
    if rank() != 0 or context.checkpoint is None:
        return
    for callback in context.model.extensions.callbacks:
        tensors = callback.exported(context, tensors)
    current = replace(
        context.checkpoint, tensors=tensors, reranking=Reranking.from_metrics(metrics)
    )
    whole = (folder / "config.json").exists()
    if whole and current.processor is not None:
        with TemporaryDirectory() as fresh:
            current.processor.save(fresh)
            names = [path.name for path in Path(fresh).iterdir()]
            whole = filecmp.cmpfiles(folder, fresh, names, shallow=False)[0] == names
    if whole:
        update_weights(current, folder)
    else:  # without the config, which comes last: a first write, that of a killed run, or of other preprocessing
        (folder / "config.json").unlink(missing_ok=True)  # before the rest goes
        for path in (*(folder / name for name in CHECKPOINT_FILES), *folder.glob(SHARDS)):
            path.unlink(missing_ok=True)
        write_checkpoint(current, folder)
    write_card(
        current,
        folder,
        metrics=metrics,
        data=[place.rstrip("/").rpartition("/")[2] for place in context.config.data.folders],
        command=f"bridgetower train {context.config.recipe}  # all settings are in {CONFIG} of the run",
    )
