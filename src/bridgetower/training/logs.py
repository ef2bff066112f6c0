"""Logs of a run: metrics.jsonl, TensorBoard, a progress bar."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from bridgetower.distributed import all_gather
from bridgetower.files import json_text, write_text, writing
from bridgetower.progress import step_bars
from bridgetower.tasks.run_config import RunConfig
from bridgetower.tasks.run_folder import METRICS, whole_lines

TENSORBOARD = "tensorboard"


class RunLog:
    """Writes metrics of one run; only the first process writes."""

    def __init__(
        self, out: Path, config: RunConfig, max_steps: int, first_step: int, *, enabled: bool, progress: bool
    ) -> None:
        self.out, self.config, self.enabled = out, config, enabled
        self.first_step, self.max_steps = first_step, max_steps
        self.seconds, self.steps = 0.0, 0
        self.description = config.recipe or "training"
        self.progress = step_bars(shown=enabled and progress)

    def __enter__(self) -> RunLog:
        if self.enabled:
            _forget_after(self.out / METRICS, self.first_step)
            self.file = (self.out / METRICS).open("a", encoding="utf-8")
            again_from = self.first_step + 1 if self.first_step else None
            self.writer = SummaryWriter(str(self.out / TENSORBOARD), purge_step=again_from)
        self.progress.start()
        self.bar = self.progress.add_task(self.description, total=self.max_steps, completed=self.first_step, metrics="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        if self.enabled:
            with writing(self.out / METRICS):  # what did not fit is tried again
                self.file.close()
            with writing(self.out / TENSORBOARD):
                self.writer.close()

    def step(self, step: int, losses: Mapping[str, Tensor], lr: float, seconds: float) -> None:
        """Counts a step and, every `log_every` steps and at the last, writes its losses and the speed since."""
        self.seconds += seconds
        self.steps += 1
        self.progress.advance(self.bar)
        if not self.enabled or not self.due(step):
            return
        pairs_per_second = self.config.batch_size * self.steps / max(self.seconds, 1e-9)
        metrics = {name: float(value) for name, value in losses.items()}
        speed = {"seconds": self.seconds, "pairs_per_second": pairs_per_second}
        self._write("train", step, metrics | {"lr": lr} | speed)
        self.seconds, self.steps = 0.0, 0
        text = f"loss {metrics['loss']:.3f}  {pairs_per_second:.0f} pairs/s"
        self.progress.update(self.bar, metrics=text)

    def due(self, step: int) -> bool:
        """Whether the metrics of a step are written; the same in every process."""
        return step % self.config.log_every == 0 or step == self.max_steps

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Says during the block that the bar stands because the model is validated."""
        self.progress.update(self.bar, description=f"{self.description}, validating")
        yield
        self.progress.update(self.bar, description=self.description)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of an evaluation."""
        if self.enabled:
            self._write("validation", step, dict(metrics))

    def _write(self, kind: str, step: int, metrics: dict[str, Any]) -> None:
        with writing(self.out / METRICS):
            self.file.write(json_text({"kind": kind, "step": step, "time": time.time(), **metrics}) + "\n")
            self.file.flush()
        with writing(self.out / TENSORBOARD):
            for name, value in metrics.items():
                self.writer.add_scalar(f"{kind}/{name}", value, step)


def mean_over_ranks(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the means of scalars over all processes, in one exchange; every process has to call it.

    Args:
        losses: The same names in every process.
    """
    values = torch.stack([value.float() for value in losses.values()])
    return dict(zip(losses, all_gather(values[None]).mean(dim=0).unbind(), strict=True))


def _forget_after(path: Path, step: int) -> None:
    """Drops what a killed run wrote after the state that it continues from, and a half-written last line."""
    if path.exists():
        write_text(path, "".join(line + "\n" for line, entry in whole_lines(path) if entry["step"] <= step))
