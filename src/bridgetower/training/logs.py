"""Logs of a run: `metrics.jsonl`, TensorBoard, installed trackers, and a progress bar."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from bridgetower.distributed import all_gather, rank
from bridgetower.files import json_text, write_text, writing
from bridgetower.progress import step_bars
from bridgetower.tasks.run_config import METRICS, RunConfig, whole_lines
from bridgetower.training.setup import TrainContext
from bridgetower.training.state import TrainingState

TENSORBOARD = "tensorboard"
PROJECT = "bridgetower"


class Logger(Protocol):
    """A tracker of one run, made by a function of its folder, its config and its first step."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes metrics with names such as train/loss and validation/rsum."""

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, out: Path, config: RunConfig, first_step: int) -> None:
        self.folder = out / TENSORBOARD
        self.writer = SummaryWriter(
            str(self.folder), purge_step=first_step + 1 if first_step else None
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        with writing(self.folder):
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.folder.exists():  # its thread would end with a traceback
            with writing(self.folder):
                self.writer.close()


class _Tracker:
    """Weights & Biases, trackio, which has its interface, or MLflow."""

    def __init__(self, out: Path, config: RunConfig, first_step: int, *, module: str) -> None:
        try:
            tracker = import_module(module)
        except ImportError as error:
            raise ValueError(
                f"report_to names {module}, which is not installed ({error}); pip install {module}"
            ) from error
        if module == "mlflow":
            tracker.set_experiment(PROJECT)
            tracker.start_run(run_name=out.name)
            tracker.log_dict(config.to_dict(), "run.json")
            self._log = tracker.log_metrics
            self.close = tracker.end_run
            return
        # By its name, --resume finds the run of a folder again.
        digest = hashlib.sha256(str(out.resolve()).encode()).hexdigest()
        name = f"{out.name}-{digest[:8]}"
        options = {"id": name, "dir": str(out)} if module == "wandb" else {}
        tracker.init(project=PROJECT, name=name, config=config.to_dict(), resume="allow", **options)
        self._log = tracker.log
        self.close = tracker.finish

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._log(dict(metrics), step=step)


LOGGERS: dict[str, Callable[[Path, RunConfig, int], Logger]] = {
    TENSORBOARD: _TensorBoard,
    **{module: partial(_Tracker, module=module) for module in ("wandb", "trackio", "mlflow")},
}


class RunLog:
    """Writes metrics of one run, in the first process only."""

    def __init__(
        self,
        context: TrainContext,
        out: Path,
        state: TrainingState,
        *,
        report_to: Sequence[str] = (),
        progress: bool,
    ) -> None:
        self.config = context.config
        self.max_steps = context.max_steps
        self.state = state
        self.out = out
        self.path = out / METRICS
        self.enabled = rank() == 0
        available = LOGGERS | context.model.extensions.loggers
        self.makers = [available[name] for name in report_to if self.enabled]
        self.loggers: list[Logger] = []
        self.description = self.config.recipe or "training"
        self.progress = step_bars(enabled=self.enabled and progress)

    def __enter__(self) -> RunLog:
        self.loggers = [make(self.out, self.config, self.state.step) for make in self.makers]
        if self.enabled:
            if self.path.exists():
                self._trim()
            self.file = self.path.open("a", encoding="utf-8")
        self.progress.start()
        self.bar = self.progress.add_task(
            self.description, total=self.max_steps, completed=self.state.step, metrics=""
        )
        self._restart()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()
        if self.enabled:
            # Closing writes buffered lines, which may not fit on the disk.
            with writing(self.path):
                self.file.close()
            for logger in self.loggers:
                logger.close()

    def _trim(self) -> None:
        """Removes lines that a killed run wrote after the state from which it continues."""
        ends = {"validation": self.state.evaluated}
        lines = [
            f"{line}\n"
            for line, entry in whole_lines(self.path)
            if entry["step"] <= ends.get(entry["kind"], self.state.step)
        ]
        write_text(self.path, "".join(lines))

    def _restart(self) -> None:
        """Starts the measurement of the speed."""
        self.started = time.perf_counter()
        self.paused_seconds = 0.0
        self.data_seconds = 0.0
        self.steps = 0

    def loaded(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yields batches and measures how long they are waited for."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            batch = next(iterator, None)
            self.data_seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def step(self, step: int, losses: Mapping[str, Tensor], lr: float) -> None:
        """Counts a step of all processes, and writes mean losses and the speed at steps that are logged."""
        self.steps += 1
        if step not in (1, self.max_steps) and step % self.config.log_every:
            self.progress.advance(self.bar)
            return
        stacked = torch.stack([value.float() for value in losses.values()])
        means = all_gather(stacked[None]).mean(dim=0)
        if not self.enabled:
            return
        values = dict(zip(losses, means.tolist(), strict=True))  # waits for the device
        seconds = max(time.perf_counter() - self.started - self.paused_seconds, 1e-9)
        rate = self.config.batch_size * self.steps / seconds
        metrics = {name: value for name, value in values.items() if math.isfinite(value)}
        metrics |= {
            "lr": lr,
            "seconds": seconds,
            "data_seconds": self.data_seconds,
            "pairs_per_second": rate,
        }
        if self.state.skipped:
            metrics["skipped_steps"] = self.state.skipped
        if torch.cuda.is_initialized():
            metrics["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        self.write("train", step, metrics)
        self._restart()
        text = f"loss {values['loss']:.3f}  {rate:,.0f} pairs/s"
        self.progress.update(self.bar, completed=step, metrics=text)

    @contextmanager
    def pausing(self, reason: str) -> Iterator[None]:
        """Leaves the time of the block out of the speed, and shows the reason beside the bar."""
        started = time.perf_counter()
        self.progress.update(self.bar, description=f"{self.description}, {reason}")
        yield
        self.progress.update(self.bar, description=self.description)
        self.paused_seconds += time.perf_counter() - started

    def write(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        if not self.enabled:
            return
        if not self.path.exists():
            raise FileNotFoundError(
                f"{self.path} was removed or moved away while the run wrote to it; start the run again"
            )
        with writing(self.path):
            line = json_text({"kind": kind, "step": step, "time": time.time(), **metrics})
            self.file.write(line + "\n")
            self.file.flush()
        numbers = {
            f"{kind}/{name}": value
            for name, value in metrics.items()
            if isinstance(value, int | float)
        }
        if numbers:
            for logger in self.loggers:
                logger.log(numbers, step)
