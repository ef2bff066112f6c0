"""Checkpoints of a run, and the states from which a killed run continues. Every write is atomic."""

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
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from bridgetower.checkpoints import Checkpoint, Reranking, update_weights, write_checkpoint
from bridgetower.checkpoints.io import CARD, write_card, write_description
from bridgetower.checkpoints.tensors import (
    SAFETENSORS,
    SHARDS,
    read_state_json,
    share_file,
    state_tensors,
    write_safetensors,
    write_state_json,
)
from bridgetower.distributed import (
    broadcast_object,
    broadcast_tensors,
    gather_objects,
    rank,
    world_size,
)
from bridgetower.files import new_folder
from bridgetower.tasks.run_config import CONFIG
from bridgetower.training.data_parallel import local_rows
from bridgetower.training.setup import TrainContext

FOLDER = "states"
_MAX_STATES = 2  # in the folder

DATA = "data"
HELD_OUT = "held-out data"
OPTIMIZER = "optimiser"
"""Conditions of a run: the digests of its data by path, and the class of its optimiser."""

CHECKPOINT_FILES = {
    "config.json",
    *SAFETENSORS,
    "carried.safetensors",
    "processor.json",
    "tokenizer.json",
    "labels.json",
    CARD,
}
"""Files that `save_checkpoint` writes, beside `SHARDS`."""

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TrainingState:
    """Progress of a run. No state of a generator is needed, as draws are functions of the seed and the step."""

    step: int = 0
    skipped: int = 0  # steps that changed no weight, as their gradients were not finite
    evaluated: int = 0  # step of the last evaluation
    best: float | None = None  # score of `best/`
    stale: int = 0  # evaluations since then
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation


def newest(out: Path) -> Path | None:
    """Returns the folder of the last state that a run saved."""
    return max((out / FOLDER).glob("step-*"), default=None)


class StateSaver:
    """Writes states of a run and keeps the last two. Every process has to use it, and to leave it."""

    def __init__(
        self,
        out: Path,
        conditions: Mapping[str, Any],
        *,
        checkpoint: Checkpoint | None = None,
        asynchronous: bool = False,
        timeout: timedelta | None = None,
    ) -> None:
        self.out = out
        self.conditions = conditions
        self.checkpoint = checkpoint
        self.asynchronous = asynchronous
        # In a group apart, exchanges of a save in the background do not meet those of the run.
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world_size() > 1 else None
        self._pool = ThreadPoolExecutor(1)
        self._pending = list[Future[None]]()

    def __enter__(self) -> StateSaver:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    def save(self, model: nn.Module, optimizer: Optimizer, state: TrainingState) -> None:
        """Writes a state, from which `load_state` restores the same bits, after the one before is written."""
        self.wait()
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for name, parameter in _named_parameters(optimizer).items():
            for kind, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor):
                    raise ValueError(
                        f"the optimiser keeps {kind} of {name} as a {type(value).__name__}; keep tensors only"
                    )
                tensors[f"{kind}.{name}"] = value
        # Every process writes its rows of sharded tensors; the first one writes all others too.
        local_tensors = {
            name: local_rows(tensor).detach().to("cpu", copy=self.asynchronous)
            for name, tensor in tensors.items()
            if isinstance(tensor, DTensor) or rank() == 0
        }
        if self.asynchronous:
            self._pending.append(self._pool.submit(self._write, local_tensors, asdict(state)))
        else:
            self._write(local_tensors, asdict(state))

    def amend(self, state: TrainingState) -> None:
        """Replaces the progress, such as the metrics, in the state that was saved last."""
        self.wait()
        folder = newest(self.out)
        if rank() == 0 and folder is not None:
            write_state_json(folder, read_state_json(folder) | {"state": asdict(state)})

    def wait(self) -> None:
        """Waits until everything is written, and raises the error of a process that could not write."""
        while self._pending:
            self._pending.pop().result()

    def _write(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Writes a state in a temporary folder, names it once it is whole, and removes old states."""
        with ExitStack() as stack:

            def begin() -> Path:
                path = self.out / FOLDER / f"step-{state['step']:08d}"
                folder = stack.enter_context(new_folder(path))
                if self.checkpoint is not None:
                    write_description(self.checkpoint, folder)
                return folder

            def write() -> bool:
                if tensors:
                    write_safetensors(share_file(folder, rank()), tensors)
                return bool(tensors)

            def finish() -> None:
                for process in range(num_writers):
                    if not share_file(folder, process).exists():
                        raise FileNotFoundError(
                            f"process {process} does not write to this {folder}; use a shared disk"
                        )
                write_state_json(
                    folder,
                    {"state": state, "conditions": self.conditions, "processes": num_writers},
                )
                stack.close()
                for path in sorted((self.out / FOLDER).glob("step-*"))[:-_MAX_STATES]:
                    rmtree(path)

            folder: Any = self._on_first_rank(begin)
            num_writers = sum(self._on_all_ranks(write))
            self._on_first_rank(finish)

    def _on_first_rank(self, function: Callable[[], Any]) -> Any:
        return self._on_all_ranks(lambda: function() if rank() == 0 else None)[0]

    def _on_all_ranks(self, function: Callable[[], Any]) -> list[Any]:
        """Returns the results of all processes, and raises an error of one in all of them."""
        try:
            result = function()
        except Exception as error:  # noqa: BLE001 - the other processes wait for it
            result = error
        results = gather_objects(result, self._group)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results


def load_state(
    out: Path, model: nn.Module, optimizer: Optimizer, conditions: Mapping[str, Any]
) -> TrainingState:
    """Restores weights and optimiser in place. A run without a saved state starts at step 0."""
    # The first process reads the progress.
    path = broadcast_object(newest(out) if rank() == 0 else None)
    if path is None:
        return TrainingState()
    saved: Any = None
    if rank() == 0:
        with _readable(path):
            saved = read_state_json(path)
            if TrainingState.__dataclass_fields__.keys() != saved["state"].keys():
                raise ValueError(f"it is of another version: {', '.join(saved['state'])}")
    saved = broadcast_object(saved)
    saved_conditions = saved["conditions"]
    _check_conditions(path, saved_conditions, conditions)

    parameters = _named_parameters(optimizer)
    has_same_optimizer = saved_conditions[OPTIMIZER] == conditions[OPTIMIZER]
    tensors = _read_tensors(path, model.state_dict(), parameters if has_same_optimizer else {})

    # Restore the weights.
    saved_shapes = {
        key: list(tensor.shape) for key, tensor in tensors.items() if key.startswith("model.")
    }
    shapes = {f"model.{name}": list(weight.shape) for name, weight in model.state_dict().items()}
    for key in {**shapes, **saved_shapes}:
        if saved_shapes.get(key) != shapes.get(key):
            raise ValueError(
                f"{path} is not of this model ({key} was {saved_shapes.get(key)}, now {shapes.get(key)}); "
                "give the options of the model as they were, or start again in another folder"
            )
    model.load_state_dict({key.removeprefix("model."): tensors[key] for key in shapes})

    # Restore the optimiser, in the order in which it would have gone on.
    optimizer.state.clear()
    numbers = dict(zip(parameters, range(len(parameters)), strict=True))
    moments = [key.partition(".")[::2] for key in tensors if key not in shapes]
    for kind, name in sorted(moments, key=lambda moment: numbers[moment[1]]):
        parameter = parameters[name]
        tensor = tensors[f"{kind}.{name}"]
        moves = optimizer.defaults.get("fused") or tensor.ndim
        optimizer.state[parameter][kind] = tensor.to(parameter.device if moves else "cpu")
    return TrainingState(**saved["state"])


def _read_tensors(
    path: Path, weights: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Reads all weights and the moments of parameters, where they are sharded the rows of this process."""
    # Every process reads sharded tensors, and the first one sends all others.
    is_sharded = any(isinstance(weight, DTensor) for weight in weights.values())
    if not is_sharded and rank() != 0:
        return broadcast_tensors({})
    tensors = {}
    with _readable(path):
        for key, tensor in state_tensors(path):
            kind, _, name = key.partition(".")
            if kind != "model" and name not in parameters:
                continue
            like: Any = weights.get(name) if kind == "model" else parameters[name]
            if isinstance(like, DTensor) and tensor.shape == like.shape:
                tensor = distribute_tensor(
                    tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
                )
            tensors[key] = tensor
    return tensors if is_sharded else broadcast_tensors(tensors)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{path} is damaged or no state of a run ({error}); remove this folder to continue from the state before, "
            "or start again in another folder"
        ) from error


def _named_parameters(optimizer: Optimizer) -> dict[str, nn.Parameter]:
    parameters: dict[str, nn.Parameter] = {}
    for group in optimizer.param_groups:
        parameters |= zip(group["names"], group["params"], strict=True)
    return parameters


def _check_conditions(path: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses other data, and warns of other changes. Sets may have moved, so paths are not compared."""
    changes = [
        f"{old_set} was trained on, now {new_set}"
        for old_set, new_set in zip(saved[DATA], current[DATA], strict=False)
        if old_set.rpartition(" (")[2] != new_set.rpartition(" (")[2]  # the splits
    ]
    old_digests = saved[DATA]
    new_digests = current[DATA]
    if saved[HELD_OUT] and current[HELD_OUT]:  # else one of the two does not evaluate
        old_digests = old_digests | saved[HELD_OUT]
        new_digests = new_digests | current[HELD_OUT]
    changes += [
        f"content of {name} was {old_digest}, now {new_digest}"
        for old_digest, (name, new_digest) in zip(
            old_digests.values(), new_digests.items(), strict=False
        )
        if old_digest != new_digest
    ]
    if not changes and len(old_digests) != len(new_digests):
        changes = [f"{len(old_digests)} files, now {len(new_digests)}"]
    if changes:
        raise ValueError(
            f"{path} is of other data: {', '.join(changes)}; put them back as they were, or start again in another "
            "folder with --init on this one"
        )

    changes = [
        f"{name} was {saved.get(name)}, now {value}"
        for name, value in current.items()
        if name not in (DATA, HELD_OUT) and saved.get(name) != value
    ]
    if changes and rank() == 0:
        logger.warning(
            "%s goes on to another result than that of an undisturbed run: %s. The examples of a step stay the same; "
            "the micro-batches they are cut into, the contrast within these, and all that is drawn for them "
            "(negatives, captions, masked and dropped words, augmentation, dropout) may not, and another optimiser "
            "starts without moments",
            path,
            "; ".join(changes),
        )


def save_checkpoint(context: TrainContext, folder: Path, metrics: Mapping[str, float]) -> None:
    """Writes the model as a checkpoint. Every process has to call this, and the first one writes."""
    tensors = {}
    for name, tensor in context.model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank() == 0:
            tensors[name] = full.cpu()
    if rank() != 0 or context.checkpoint is None:
        return
    for callback in context.model.extensions.callbacks:
        tensors = callback.exported(context, tensors)
    checkpoint = replace(
        context.checkpoint, tensors=tensors, reranking=Reranking.from_metrics(metrics)
    )

    # Replace the weights in a whole checkpoint with the same preprocessing.
    is_current = (folder / "config.json").exists()
    if is_current and checkpoint.processor is not None:
        with TemporaryDirectory() as temporary:
            checkpoint.processor.save(temporary)
            names = [path.name for path in Path(temporary).iterdir()]
            is_current = filecmp.cmpfiles(folder, temporary, names, shallow=False)[0] == names
    if is_current:
        update_weights(checkpoint, folder)
    # Write any other checkpoint anew. Its config is removed first and written last, as it marks a whole one.
    else:
        (folder / "config.json").unlink(missing_ok=True)
        for path in (*(folder / name for name in CHECKPOINT_FILES), *folder.glob(SHARDS)):
            path.unlink(missing_ok=True)
        write_checkpoint(checkpoint, folder)
    write_card(
        checkpoint,
        folder,
        metrics=metrics,
        data=[path.rstrip("/").rpartition("/")[2] for path in context.config.data.folders],
        command=f"bridgetower train {context.config.recipe}  # all settings are in {CONFIG} of the run",
    )
