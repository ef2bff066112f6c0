"""Logs of a run: metrics.jsonl, TensorBoard and trackers that are installed, a progress bar."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from bridgetower.distributed import all_gather
from bridgetower.files import json_text, write_text, writing
from bridgetower.progress import step_bars
from bridgetower.tasks.run_config import METRICS, RunConfig, whole_lines
from bridgetower.training.state import TrainingState

TENSORBOARD = "tensorboard"
PROJECT = "bridgetower"


class Logger(Protocol):
    """A tracker of one run; made by a function of its folder, its config and the step that it starts from."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...  # names such as train/loss, validation/rsum

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, out: Path, config: RunConfig, first_step: int) -> None:
        self.folder = out / TENSORBOARD
        self.writer = SummaryWriter(str(self.folder), purge_step=first_step + 1 if first_step else None)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        with writing(self.folder):
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.folder.exists():  # its thread would end with a traceback
            with writing(self.folder):
                self.writer.close()


class _WandB:
    """Weights & Biases, or trackio, which has its interface."""

    def __init__(self, out: Path, config: RunConfig, first_step: int, module: str = "wandb") -> None:
        self.tracker = _installed(module)
        name = f"{out.name}-{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:8]}"  # to go on with by --resume
        places = {"id": name, "dir": str(out)} if module == "wandb" else {}
        self.tracker.init(project=PROJECT, name=name, config=config.to_dict(), resume="allow", **places)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.tracker.log(dict(metrics), step=step)

    def close(self) -> None:
        self.tracker.finish()


class _MLflow:
    def __init__(self, out: Path, config: RunConfig, first_step: int) -> None:
        self.tracker = _installed("mlflow")
        self.tracker.set_experiment(PROJECT)
        self.tracker.start_run(run_name=out.name)
        self.tracker.log_dict(config.to_dict(), "run.json")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.tracker.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        self.tracker.end_run()


LOGGERS: dict[str, Callable[[Path, RunConfig, int], Logger]] = {
    TENSORBOARD: _TensorBoard,
    "wandb": _WandB,
    "trackio": partial(_WandB, module="trackio"),
    "mlflow": _MLflow,
}


def _installed(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f"report_to names {name}, which is not installed ({error}); pip install {name}") from error


PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Products in bfloat16 per second, twice the multiply-adds, of dense matrices, by part of the name of a GPU."""


class RunLog:
    """Writes metrics of one run; only the first process writes."""

    step_flops: float | None = None

    def __init__(
        self,
        out: Path,
        config: RunConfig,
        max_steps: int,
        state: TrainingState,
        *,
        loggers: Sequence[Logger] = (),
        enabled: bool,
        progress: bool,
    ) -> None:
        self.out, self.config, self.enabled, self.loggers = out, config, enabled, loggers
        self.state, self.max_steps, self.description = state, max_steps, config.recipe or "training"
        self.progress = step_bars(shown=enabled and progress)
        self._restart()

    def __enter__(self) -> RunLog:
        if self.enabled:
            path, last = self.out / METRICS, {"validation": self.state.evaluated}
            if path.exists():  # without what a killed run wrote after the state that it continues from
                entries = [(line, last.get(entry["kind"], self.state.step), entry) for line, entry in whole_lines(path)]
                write_text(path, "".join(f"{line}\n" for line, end, entry in entries if entry["step"] <= end))
            self.file = path.open("a", encoding="utf-8")
        self.progress.start()
        self.bar = self.progress.add_task(self.description, total=self.max_steps, completed=self.state.step, metrics="")
        self._restart()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()
        if self.enabled:
            with writing(self.out / METRICS):  # what did not fit is tried again
                self.file.close()
            for logger in self.loggers:
                logger.close()

    def _restart(self) -> None:
        self.since, self.paused, self.waited, self.steps = time.perf_counter(), 0.0, 0.0, 0

    def loaded(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yields batches; the time that they are waited for is counted."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            batch = next(iterator, None)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def step(self, step: int, losses: Mapping[str, Tensor], lr: float) -> None:
        """Counts a step and, every `log_every` steps and at the last, writes its losses and the speed since."""
        self.steps += 1
        self.progress.advance(self.bar)
        if not self.enabled or not self.due(step):
            return
        values = {name: float(value) for name, value in losses.items()}  # waits for the device
        seconds = max(time.perf_counter() - self.since - self.paused, 1e-9)
        rate, peak = self.config.batch_size * self.steps / seconds, peak_flops()
        metrics = {name: value for name, value in values.items() if math.isfinite(value)}
        metrics |= {"lr": lr, "seconds": seconds, "data_seconds": self.waited, "pairs_per_second": rate}
        if self.state.skipped:
            metrics["skipped_steps"] = self.state.skipped
        if self.step_flops is not None and peak is not None:
            metrics["mfu"] = self.step_flops * self.steps / seconds / peak
        if torch.cuda.is_initialized():
            metrics["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        self.write("train", step, metrics)
        self._restart()
        self.progress.update(self.bar, metrics=f"loss {values['loss']:.3f}  {rate:.0f} pairs/s")

    def due(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.max_steps

    @contextmanager
    def pausing(self, what: str) -> Iterator[None]:
        """Leaves what is done in the block out of the speed, and says beside the bar why it stands."""
        started = time.perf_counter()
        self.progress.update(self.bar, description=f"{self.description}, {what}")
        yield
        self.progress.update(self.bar, description=self.description)
        self.paused += time.perf_counter() - started

    def write(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        if not self.enabled:
            return
        path = self.out / METRICS
        if not path.exists():
            raise FileNotFoundError(f"{path} was removed or moved away while the run wrote to it; start the run again")
        with writing(path):
            self.file.write(json_text({"kind": kind, "step": step, "time": time.time(), **metrics}) + "\n")
            self.file.flush()
        numbers = {f"{kind}/{name}": value for name, value in metrics.items() if isinstance(value, int | float)}
        for logger in self.loggers:
            logger.log(numbers, step)


def peak_flops() -> float | None:
    kind = torch.cuda.get_device_name() if torch.cuda.is_initialized() else ""
    return next((peak for part, peak in PEAKS.items() if part in kind), None)


def mean_over_ranks(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every process has to call it."""
    values = torch.stack([value.float() for value in losses.values()])
    return dict(zip(losses, all_gather(values[None]).mean(dim=0).unbind(), strict=True))
