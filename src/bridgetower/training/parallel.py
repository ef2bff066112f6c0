"""Several runs side by side on the CPU: one process each, cores shared out."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bridgetower.training.config import RunConfig
from bridgetower.training.logs import METRICS, read_metrics
from bridgetower.training.run import CONFIG, train

POLL_SECONDS = 0.5


def train_all(runs: Mapping[Path, RunConfig], *, progress: bool = True) -> None:
    """Trains every run in its folder; one that was cut off is resumed, a finished one is left as it is.

    As many processes as there are cores and runs, each with its share of the threads: small models gain more from a
    core of their own than from threads that wait for each other.

    Args:
        runs: Folder to config.
        progress: Show a bar per run.

    Raises:
        Interrupted: A signal asked to stop; every run saved its state.
        ValueError, FloatingPointError: As `train`, of the first run that fails; the others stop and save.
    """
    cores = os.cpu_count() or 1
    workers = min(len(runs), cores)
    with (
        _forwarding_sigterm(),
        ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=torch.set_num_threads,
            initargs=(max(1, cores // workers),),
        ) as pool,
    ):
        futures = {pool.submit(_train_one, config, folder): folder for folder, config in runs.items()}
        _watch(futures, runs, progress)
        for future in futures:
            future.result()


def _train_one(config: RunConfig, folder: Path) -> None:
    train(config, folder, resume=(folder / CONFIG).exists(), progress=False)


def _watch(futures: Mapping[Future[None], Path], runs: Mapping[Path, RunConfig], progress: bool) -> None:
    """Shows how far the runs are until all are done or one fails, which stops the others."""
    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (progress and console.is_terminal),
    )
    tasks = {folder: bars.add_task(folder.name, total=config.max_steps, figures="") for folder, config in runs.items()}
    with bars:
        while True:
            done, pending = wait(futures, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
            for folder, task in tasks.items():
                lines = read_metrics(folder, "train") if (folder / METRICS).exists() else []
                if lines:
                    last = lines[-1]
                    figures = f"loss {last['loss']:.3f}  {last['pairs_per_second']:.0f} pairs/s"
                    bars.update(task, completed=last["step"], figures=figures)
            if any(future.exception() for future in done):
                for future in pending:
                    future.cancel()
                _stop_children()
                return
            if not pending:
                return


@contextmanager
def _forwarding_sigterm() -> Iterator[None]:
    """Passes SIGTERM on to the processes that train; they save their state and report that they were interrupted."""

    def forward(number: int, frame: FrameType | None) -> None:
        _stop_children()

    previous = signal.signal(signal.SIGTERM, forward)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop_children() -> None:
    for child in multiprocessing.active_children():
        child.terminate()
