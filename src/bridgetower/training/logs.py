"""Logs of a run: metrics.jsonl, loggers, a progress bar."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from bridgetower.distributed import all_gather
from bridgetower.files import json_text, write_text, writing
from bridgetower.progress import step_bars
from bridgetower.tasks.run_config import METRICS, RunConfig, whole_lines
from bridgetower.training.loggers import Logger
from bridgetower.training.state import TrainingState

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Products in bfloat16 per second, twice the multiply-adds, of dense matrices, by part of the name of a GPU."""


class RunLog:
    """Writes metrics of one run; only the first process writes."""

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
        self.state, self.max_steps = state, max_steps
        self.since, self.paused, self.waited, self.steps = time.perf_counter(), 0.0, 0.0, 0
        self.step_flops: float | None = None
        self.description = config.recipe or "training"
        self.progress = step_bars(shown=enabled and progress)

    def __enter__(self) -> RunLog:
        if self.enabled:
            path, last = self.out / METRICS, {"validation": self.state.evaluated}
            if path.exists():  # without what a killed run wrote after the state that it continues from
                entries = [(line, last.get(entry["kind"], self.state.step), entry) for line, entry in whole_lines(path)]
                write_text(path, "".join(f"{line}\n" for line, end, entry in entries if entry["step"] <= end))
            self.file = path.open("a", encoding="utf-8")
        self.progress.start()
        self.bar = self.progress.add_task(self.description, total=self.max_steps, completed=self.state.step, metrics="")
        self.since = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        if self.enabled:
            with writing(self.out / METRICS):  # what did not fit is tried again
                self.file.close()
            for logger in self.loggers:
                logger.close()

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
        rate = self.config.batch_size * self.steps / seconds
        metrics = {name: value for name, value in values.items() if math.isfinite(value)} | {
            "lr": lr,
            "seconds": seconds,
            "data_seconds": self.waited,
            "pairs_per_second": rate,
        }
        if self.state.skipped:
            metrics["skipped_steps"] = self.state.skipped
        peak = peak_flops()
        if self.step_flops is not None and peak is not None:
            metrics["mfu"] = self.step_flops * self.steps / seconds / peak
        if torch.cuda.is_initialized():
            metrics["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        self.write("train", step, metrics)
        self.since, self.paused, self.waited, self.steps = time.perf_counter(), 0.0, 0.0, 0
        self.progress.update(self.bar, metrics=f"loss {values['loss']:.3f}  {rate:.0f} pairs/s")

    def due(self, step: int) -> bool:
        """Whether the metrics of a step are written; the same in every process."""
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
        """Writes a line of `metrics.jsonl`, and hands its numbers to the loggers."""
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
    """Returns the products in bfloat16 per second of this GPU at best, twice the multiply-adds; None if not known."""
    kind = torch.cuda.get_device_name() if torch.cuda.is_initialized() else ""
    return next((peak for part, peak in PEAKS.items() if part in kind), None)


def mean_over_ranks(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the means of scalars over all processes, in one exchange; every process has to call it."""
    values = torch.stack([value.float() for value in losses.values()])
    return dict(zip(losses, all_gather(values[None]).mean(dim=0).unbind(), strict=True))
