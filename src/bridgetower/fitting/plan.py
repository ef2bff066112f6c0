"""The plan of a fit: what is trained, what it takes, and the commands that do the same."""

from __future__ import annotations

import resource
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bridgetower.data.batches.batch import BatchKey
from bridgetower.data.sets.prepared_set import fold_names, read_info
from bridgetower.distributed import world_size
from bridgetower.files import differences
from bridgetower.fitting.rules import Splits, Trained
from bridgetower.fitting.survey import Task
from bridgetower.model.layers import autocast
from bridgetower.tasks.run_config import RunConfig
from bridgetower.tasks.table import RECIPES, spec_of
from bridgetower.training.run import build_model
from bridgetower.training.setup import TrainContext, build_task, starting_checkpoint, with_classes

TIMED_EXAMPLES = 16  # of the batches that are timed, at most
_STATES_KEPT = 2  # of a run, beside best/ and last/
_OPTIMIZER_COPIES = 3  # a weight, and both moments of AdamW


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a fit takes, from two timed steps.

    Attributes:
        seconds: By phase.
        memory: Bytes of this process, the highest of the timed steps.
        disk: Bytes of features, states and models.
        step_seconds: Of a step.
        steps: Of all runs, if none ends early.
    """

    seconds: Mapping[str, float]
    memory: int
    disk: int
    step_seconds: float
    steps: int

    @property
    def minutes(self) -> float:
        return sum(self.seconds.values()) / 60


@dataclass(frozen=True, kw_only=True)
class FitPlan:
    """What is done with a source.

    Attributes:
        source: The source.
        out: Folder of the fit.
        task: The task and its columns.
        splits: Splits by their use.
        config: The run that makes the model.
        trained: What is trained.
        counts: Images and entries by split.
        left_out: Rows that are left out, by reason.
        costs: What it takes; None before it is measured.
        max_errors: Rows that may be left out.
    """

    source: str
    out: Path
    task: Task
    splits: Splits
    config: RunConfig
    trained: Trained
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    costs: Costs | None = None
    max_errors: int = 0

    @property
    def data(self) -> Path:
        return self.out / "data"

    @property
    def run(self) -> Path:
        """Folder of the run that makes the model."""
        return self.out / "run"

    @property
    def checkpoint(self) -> Path:
        """Folder of the model."""
        return self.run / ("best" if self.splits.validation else "last")

    @property
    def folds(self) -> tuple[str, ...]:
        return tuple(fold_names(self.splits.folds))

    def fold_run(self, fold: str) -> Path:
        return self.out / "folds" / fold

    def fold_config(self, fold: str) -> RunConfig:
        """Returns the run that trains on all folds but one."""
        other_folds = tuple(name for name in self.folds if name != fold)
        data = replace(self.config.data, train_splits=other_folds, validation_split=fold)
        return replace(self.config, data=data)

    def commands(self) -> list[str]:
        """Returns the commands that do the same."""
        benchmark = next(iter(spec_of(self.config.task).benchmarks))
        prepare = ["prepare", self.task.kind, self.source, "--out", str(self.data)]
        for name, value in {**self.task.settings, **self.splits.settings}.items():
            prepare += [_option_of(name), str(value)]
        if self.max_errors:
            prepare += ["--max-errors", str(self.max_errors)]
        commands = [prepare]
        for fold in self.folds:
            run = self.fold_run(fold)
            commands.append(training_arguments(self.fold_config(fold), run))
            commands.append(evaluation_arguments(run / "last", benchmark, self.data, fold))
        commands.append(training_arguments(self.config, self.run))
        if not self.folds:
            commands.append(
                evaluation_arguments(self.checkpoint, benchmark, self.data, self.splits.test)
            )
        return [shlex.join(["bridgetower", *command]) for command in commands]

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON holds it."""
        costs = self.costs
        return {
            "source": self.source,
            "out": str(self.out),
            "task": self.task.kind,
            "columns": list(self.task.lines),
            "splits": asdict(self.splits),
            "counts": {name: dict(counts) for name, counts in self.counts.items()},
            "left_out": dict(self.left_out),
            "init": self.config.init,
            "trained": self.trained,
            "batch_size": self.config.batch_size,
            "max_epochs": self.config.max_epochs,
            "learning_rate": self.config.optimizer.lr,
            "precision": self.config.precision,
            "costs": None if costs is None else {**asdict(costs), "minutes": costs.minutes},
            "commands": self.commands(),
        }


def training_arguments(config: RunConfig, out: Path) -> list[str]:
    """Returns the arguments of the command that trains a run: its recipe, and what differs from that."""
    arguments = ["train", config.recipe]
    for name, _, value in differences(RECIPES[config.recipe].to_dict(), config.to_dict()):
        if isinstance(value, bool):
            arguments.append(_option_of(name) if value else _option_of(f"no_{name}"))
        else:
            values = value if isinstance(value, list | tuple) else [value]
            arguments += [_option_of(name), *map(str, values)]
    return [*arguments, "--out", str(out)]


def evaluation_arguments(model: Path, benchmark: str, data: Path, split: str) -> list[str]:
    return ["evaluate", str(model), benchmark, "--data", str(data), "--split", split]


def _option_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def measure_costs(plan: FitPlan) -> Costs:
    """Times two steps of the plan, the second of which counts, and scales them to the whole set.

    Every process of a distributed run has to call it.

    Raises:
        ValueError: The model and the data do not fit.
    """
    spec = spec_of(plan.config.task)
    config = with_classes(plan.config, spec)
    checkpoint = starting_checkpoint(config, spec)
    model_bytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    context = build_task(config, checkpoint, build_model(config, checkpoint), spec)
    del checkpoint
    local_batch = config.batch_size // world_size()
    size = min(TIMED_EXAMPLES, local_batch, len(context.examples))
    for _ in range(2):
        tower_seconds, step_seconds = _timed_step(context, size)

    info = read_info(plan.data)
    num_images = sum(split.images for split in info.splits.values())
    num_runs = 1 + plan.splits.folds
    steps = num_runs * context.max_steps
    share = local_batch / size
    seconds = {"reading the model": 5.0 * num_runs}
    if config.freeze_towers:
        seconds["features"] = tower_seconds / size * num_images / world_size()
        step_seconds = max(step_seconds - tower_seconds, 0.2 * step_seconds)
    seconds["training"] = steps * step_seconds * share
    entries = {name: split.examples for name, split in info.splits.items()}
    num_evaluated = sum(entries.values())
    if not plan.splits.folds:
        num_evaluations = min(config.max_epochs or 1, 20)
        num_evaluated = num_evaluations * entries.get(plan.splits.validation, 0)
        num_evaluated += entries.get(plan.splits.test, 0)
    # A forward pass takes a third of a step.
    seconds["evaluating"] = num_evaluated * step_seconds / size / 3 / world_size()
    disk = model_bytes * (2 + _STATES_KEPT * _OPTIMIZER_COPIES) * num_runs
    if config.freeze_towers:
        disk += feature_bytes(context, num_images)
    scale = 1 if sys.platform == "darwin" else 1024  # of what getrusage counts
    return Costs(
        seconds={name: round(value, 1) for name, value in seconds.items()},
        memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale,
        disk=disk,
        step_seconds=step_seconds * share,
        steps=steps,
    )


def _timed_step(context: TrainContext, size: int) -> tuple[float, float]:
    """Returns the seconds of the towers alone and those of a step, of a micro-batch."""
    model = context.model
    batch: Any = context.examples[BatchKey(tuple(range(size)), 0)].to(model.device)
    start = time.perf_counter()
    if context.config.freeze_towers:
        with torch.no_grad():
            if batch.pixel_values is not None:
                model.encode_image(batch.pixel_values)
            model.encode_text(batch.input_ids, batch.attention_mask)
    towers = time.perf_counter() - start
    start = time.perf_counter()
    with autocast(model.device, context.config.precision):
        losses = context.task(batch)
    losses.total.backward()
    model.zero_grad(set_to_none=True)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return towers, time.perf_counter() - start


def feature_bytes(context: TrainContext, num_images: int) -> int:
    """Returns the size of cached hidden states of the images."""
    config = context.model.config
    dtype_bytes = 2 if context.config.precision == "bf16" else 4
    row = config.vision.num_tokens * config.vision.hidden_size * len(config.vision_layers)
    return num_images * context.config.frozen_views * row * dtype_bytes
