"""What a killed run continues from: weights, optimiser, step; each process writes its share, and nothing by halves."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from shutil import rmtree
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.optim import Optimizer

from bridgetower.checkpoints.tensors import LAYOUT, read_about, write_about
from bridgetower.distributed import from_first, rank, world_size
from bridgetower.files import new_folder
from bridgetower.training.state_files import StateReader, StateWriter

FOLDER = "states"
KEPT = 2  # states

DATA, OPTIMIZER = "data", "optimiser"
"""Conditions of a run: digests of its data by path, with which it has to go on, and the class of its optimiser."""

logger = logging.getLogger(__name__)

# PyTorch says so at every save and load of a run of one process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(kw_only=True)
class TrainingState:
    """Where a run is.

    Batches, masks, negatives and dropout are functions of the seed and the step, so no generator state is kept.

    Attributes:
        step: Optimiser steps done.
        skipped: Those among them whose gradients were not finite, so that no weight changed.
        evaluated: Step of the last evaluation.
        best, best_step: Best validation metric so far, and when.
        metrics: Of the last evaluation.
    """

    step: int = 0
    skipped: int = 0
    evaluated: int = 0
    best: float | None = None
    best_step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


def newest(out: Path) -> Path | None:
    """Returns the folder of the last state that a run saved; None if it has saved none."""
    return max((out / FOLDER).glob("step-*"), default=None)


class StateSaver:
    """Writes states of a run, of which the last two are kept; every process has to use it.

    As a context manager it waits at its end until everything is written.
    """

    def __init__(
        self,
        out: Path,
        conditions: Mapping[str, Any],
        *,
        describe: Callable[[Path], None] = lambda folder: None,
        asynchronous: bool = False,
        timeout: timedelta | None = None,
    ) -> None:
        self.out, self.conditions, self.describe, self.asynchronous = out, dict(conditions), describe, asynchronous
        # Of its own: the exchanges of a save in the background must not meet those of the run.
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world_size() > 1 else None
        self._opened, self._pending = ExitStack(), Future[Any]()
        self._pending.set_result(None)

    def __enter__(self) -> StateSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait()

    def save(self, model: nn.Module, optimizer: Optimizer, state: TrainingState) -> None:
        """Writes a state so that `load_state` gives the same bits; first waits for the one before."""
        self.wait()
        path = self.out / FOLDER / f"step-{state.step:08d}"
        temporary = ""
        if rank() == 0:
            folder = self._opened.enter_context(new_folder(path))
            self.describe(folder)
            temporary = str(folder)
        temporary = from_first(temporary)
        about = {"state": asdict(state), "conditions": self.conditions}
        tensors = _tensors(model, optimizer) if rank() == 0 or _is_sharded(model) else {}
        options: dict[str, Any] = {
            "storage_writer": StateWriter(Path(temporary), about, self._finish),
            "planner": DefaultSavePlanner(flatten_state_dict=False, dedup_save_to_lowest_rank=True),
            "process_group": self._group,
        }
        with self._failures():
            if self.asynchronous:
                pending: Any = async_save(tensors, **options)
                self._pending = pending
            else:
                save(tensors, **options)

    def amend(self, state: TrainingState) -> None:
        """Notes in the state that was saved last what was found since, such as metrics, in the first process."""
        self.wait()
        folder = newest(self.out)
        if rank() == 0 and folder is not None:
            write_about(folder, read_about(folder) | {"state": asdict(state)})

    def wait(self) -> None:
        """Waits until everything is written."""
        with self._failures():
            self._pending.result()

    def _finish(self) -> None:
        """Gives a whole state its name, in the first process, and removes old ones."""
        self._opened.close()
        for path in sorted((self.out / FOLDER).glob("step-*"))[:-KEPT]:
            rmtree(path)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Removes what was written of a state that failed, and raises the error of the process where it did."""
        try:
            yield
        except CheckpointException as error:
            failure, _ = next(iter(error.failures.values()))
            self._opened.__exit__(type(failure), failure, failure.__traceback__)
            raise failure from error


def load_state(out: Path, model: nn.Module, optimizer: Optimizer, conditions: Mapping[str, Any]) -> TrainingState:
    """Restores weights and optimiser in place; a run without a state yet starts at step 0.

    Processes that have whole weights get them from the first, and need not see the folder; with weights that are
    shared out, each reads its share, however many there were before. What the state has of parameters that are not
    optimised any more is left behind, and all of another optimiser.
    """
    about = from_first(_about(out) if rank() == 0 else None)
    if about is None:
        return TrainingState()
    path, layout, shared = Path(about["path"]), about[LAYOUT], _is_sharded(model)
    _check_conditions(path, about["conditions"], conditions)
    keeps_moments = about["conditions"][OPTIMIZER] == conditions[OPTIMIZER]
    layout = {key: of for key, of in layout.items() if key.startswith("model.") or keeps_moments}
    parameters = _parameters(optimizer)
    layout = {key: of for key, of in layout.items() if key.startswith("model.") or key.partition(".")[2] in parameters}
    weights = model.state_dict()
    shapes = {f"model.{name}": list(tensor.shape) for name, tensor in weights.items()}
    before = {key: of["shape"] for key, of in layout.items() if key.startswith("model.")}
    others = [key for key in {**shapes, **before} if shapes.get(key) != before.get(key)]
    if others:
        raise ValueError(
            f"{path} is not of this model ({others[0]} was {before.get(others[0])}, now {shapes.get(others[0])}); "
            "give the options of the model as they were, or start again in another folder"
        )
    tensors = {}  # to read into: on the CPU, or shared out as the parameters are
    for key, of in layout.items():
        kind, _, name = key.partition(".")
        like, dtype = weights[name] if kind == "model" else parameters[name], getattr(torch, of["dtype"])
        is_cut = of["shape"] == list(like.shape) and hasattr(like, "full_tensor")
        tensors[key] = torch.empty_like(like, dtype=dtype) if is_cut else torch.empty(of["shape"], dtype=dtype)
    if shared or rank() == 0:
        with _readable(path):
            reader, planner = StateReader(path, about[LAYOUT]), DefaultLoadPlanner(flatten_state_dict=False)
            load(tensors, storage_reader=reader, planner=planner, no_dist=not shared)
    tensors = tensors if shared else from_first(tensors)
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    optimizer.state.clear()
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind != "model":
            device = parameters[name].device if optimizer.defaults.get("fused") or tensor.ndim else "cpu"
            optimizer.state[parameters[name]][kind] = tensor.to(device)
    return TrainingState(**about["state"])


def _about(out: Path) -> dict[str, Any] | None:
    path = newest(out)
    if path is None:
        return None
    with _readable(path):
        about = read_about(path)
        if {field.name for field in TrainingState.__dataclass_fields__.values()} != about["state"].keys():
            raise ValueError(f"it is of another version: {', '.join(about['state'])}")
    return {"path": str(path), **about}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointException, OSError, ValueError, KeyError) as error:
        failure = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise ValueError(
            f"{path} is damaged or no state of a run ({failure}); remove this folder to continue from the state "
            "before, or start again in another folder"
        ) from error


def _parameters(optimizer: Optimizer) -> dict[str, nn.Parameter]:
    pairs = (zip(group["names"], group["params"], strict=True) for group in optimizer.param_groups)
    return {name: parameter for group in pairs for name, parameter in group}


def _is_sharded(model: nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in _parameters(optimizer).items():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise ValueError(f"the optimiser keeps {kind} of {name} as a {type(value).__name__}; keep tensors only")
            tensors[f"{kind}.{name}"] = value
    return tensors


def _check_conditions(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Logs what has changed."""
    old, new = before[DATA], now[DATA]
    if list(old.values()) != list(new.values()):
        found = ", ".join(
            f"content of {place} was {digest}, now {other}"
            for (place, other), digest in zip(new.items(), old.values(), strict=False)
            if digest != other
        )
        raise ValueError(
            f"{path} is of other data: {found or f'{len(old)} files, now {len(new)}'}; put them back as they were, or "
            "start again in another folder with --init on this one"
        )
    changed = [f"{name} was {before.get(name)}, now {now[name]}" for name in now if before.get(name) != now[name]]
    changed = [line for line in changed if not line.startswith(f"{DATA} was")]
    if changed and rank() == 0:
        logger.warning(
            "%s goes on to another result than that of an undisturbed run: %s. The examples of a step stay the same; "
            "the micro-batches they are cut into, the contrast within these, and all that is drawn for them "
            "(negatives, captions, masked and dropped words, augmentation, dropout) may not, and another optimiser "
            "starts without moments",
            path,
            "; ".join(changed),
        )
