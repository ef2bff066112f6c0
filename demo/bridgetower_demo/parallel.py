"""Several runs side by side on the CPU: one process each, cores shared out."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessException, start_processes

from bridgetower.distributed import available_cores
from bridgetower.progress import step_bars
from bridgetower.tasks.run_config import CONFIG, METRICS, RunConfig, read_metrics
from bridgetower.training.run import train
from bridgetower.training.trainer import Interrupted, stop_signals
from bridgetower_demo.recipes import task_of

POLL_SECONDS = 0.5
# what every run imports after its start
_LATE = (
    "datasets",
    "sklearn.linear_model",
    "torch._dynamo",
)

# What `train` documents. Anything else is a fault of the program: the process prints its traceback and is lost.
_REPORTED = (Interrupted, ValueError, OSError, FloatingPointError)


class LostProcessError(RuntimeError):
    """The process of a run was killed, or ended by a fault of the program."""


def train_all(
    runs: Mapping[Path, RunConfig], *, feature_cache: Path | None = None, progress: bool = True
) -> None:
    """Trains every run in its folder; one that was cut off is resumed, a finished one is left as it is.

    As many processes as there are cores and runs, each with its share of the threads: small models gain more from a
    core of their own than from threads that wait for each other. They are forked from a new process that imports
    what they need once, so a script that calls this needs `if __name__ == "__main__":`. They also stop and save when
    this process is killed.
    """
    if not runs:
        return
    cores = available_cores()
    workers = min(len(runs), cores)
    shares = [list(runs.items())[worker::workers] for worker in range(workers)]
    context = get_context("forkserver")
    # a later call finds the imports done
    context.set_forkserver_preload([_train_each.__module__, *_LATE])
    outcomes = context.SimpleQueue()
    with stop_signals() as stop, _bars(runs, progress) as show:
        processes = start_processes(
            _train_each,
            (shares, cores // workers, outcomes, feature_cache),
            workers,
            join=False,
            start_method="forkserver",
        )
        lost, ended_early = None, False
        try:
            while not processes.join(POLL_SECONDS):
                show()
                if stop and not ended_early:  # they save and stop
                    ended_early = True
                    for process in processes.processes:
                        process.terminate()
        except ProcessException as error:
            lost = error
    ended: list[Exception | None] = []
    while not outcomes.empty():
        ended.append(outcomes.get())
    for outcome in ended:
        if outcome is not None and not isinstance(outcome, Interrupted):
            raise outcome
    if stop:
        raise Interrupted(f"stopped with {ended.count(None)} of {len(runs)} runs finished")
    if lost is not None:
        names = " or ".join(str(folder) for folder, _ in shares[lost.error_index])
        raise LostProcessError(
            f"the process of run {names} was lost ({lost}), if killed perhaps for want of memory; what it saved is "
            "kept, run the same again to continue it"
        )


def _train_each(
    worker: int,
    shares: Sequence[Sequence[tuple[Path, RunConfig]]],
    threads: int,
    outcomes: Any,
    feature_cache: Path | None,
) -> None:
    """Trains the runs of a worker one after another, and reports of each None or its error."""
    parent = parent_process()
    assert parent is not None

    def stop_after_parent() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=stop_after_parent, daemon=True).start()
    torch.set_num_threads(threads)
    for folder, config in shares[worker]:
        try:
            resume = (folder / CONFIG).exists()
            train(
                config,
                folder,
                task=task_of(config),
                resume=resume,
                feature_cache=feature_cache,
                progress=False,
            )
        except _REPORTED as error:
            outcomes.put(error)
            raise SystemExit(1) from None
        outcomes.put(None)


@contextmanager
def _bars(runs: Mapping[Path, RunConfig], progress: bool) -> Iterator[Callable[[], None]]:
    """Shows a bar per run; yields what brings them up to date."""
    bars = step_bars(enabled=progress)
    tasks = {
        folder: bars.add_task(folder.name, total=config.max_steps, metrics="")
        for folder, config in runs.items()
    }

    def show() -> None:
        for folder, task in tasks.items():
            lines = read_metrics(folder, "train") if (folder / METRICS).exists() else []
            if lines:
                last = lines[-1]
                metrics = f"loss {last['loss']:.3f}  {last['pairs_per_second']:.0f} pairs/s"
                bars.update(task, completed=last["step"], metrics=metrics)

    with bars:
        yield show
