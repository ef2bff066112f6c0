"""Where metrics of a run go beside `metrics.jsonl`: TensorBoard, and trackers that are installed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Protocol

from torch.utils.tensorboard import SummaryWriter

from bridgetower.files import writing
from bridgetower.tasks.run_config import RunConfig

TENSORBOARD = "tensorboard"
PROJECT = "bridgetower"


class Logger(Protocol):
    """A tracker of one run; made by a function of its folder, its config and the step that it starts from."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes metrics by names such as `train/loss` and `validation/rsum`."""
        ...

    def close(self) -> None:
        """Ends the run."""
        ...


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

    module = "wandb"

    def __init__(self, out: Path, config: RunConfig, first_step: int) -> None:
        self.tracker = _installed(self.module)
        name = f"{out.name}-{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:8]}"  # to go on with by --resume
        places = {"id": name, "dir": str(out)} if self.module == "wandb" else {}
        self.tracker.init(project=PROJECT, name=name, config=config.to_dict(), resume="allow", **places)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.tracker.log(dict(metrics), step=step)

    def close(self) -> None:
        self.tracker.finish()


class _Trackio(_WandB):
    module = "trackio"


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
    "trackio": _Trackio,
    "mlflow": _MLflow,
}


def _installed(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f"report_to names {name}, which is not installed ({error}); pip install {name}") from error
