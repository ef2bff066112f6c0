"""Several runs side by side on the CPU: one process each, cores shared out."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType

import torch

from bridgetower.distributed import available_cores
from bridgetower.progress import step_bars
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.logs import METRICS, read_metrics
from bridgetower.training.loop import Interrupted
from bridgetower.training.run import CONFIG, train
from bridgetower.training.signals import stop_signals

POLL_SECONDS = 0.5

# What `train` documents. Anything else is a fault of the program: the child prints its traceback and is lost.
_REPORTED = (Interrupted, ValueError, OSError, FloatingPointError)


class LostProcessError(RuntimeError):
    """The process of a run ended without a word: killed, or a fault of the program that it printed."""


def train_all(runs: Mapping[Path, RunConfig], *, progress: bool = True) -> None:
    """Trains every run in its folder; one that was cut off is resumed, a finished one is left as it is.

    As many processes as there are cores and runs, each with its share of the threads: small models gain more from a
    core of their own than from threads that wait for each other. The processes are spawned, so a script that calls
    this needs `if __name__ == "__main__":`. They also stop and save when this process is killed.

    Args:
        runs: Folder to config.
        progress: Show a bar per run.

    Raises:
        Interrupted: SIGINT or SIGTERM asked to stop; what had started saved its state, and the same call continues it.
        ValueError, OSError, FloatingPointError: As `train`, of the first run that fails; the others stop and save.
        LostProcessError: A process was lost, killed for want of memory for example; the others stop and save.
    """
    cores = available_cores()
    workers = max(1, min(len(runs), cores))
    with stop_signals() as stop, _bars(runs, progress) as show, _Children(runs, max(1, cores // workers)) as children:
        while children.running or (children.waiting and not (stop.requested or children.errors)):
            if stop.requested or children.errors:
                children.stop()
            else:
                children.start(workers)
            children.wait(POLL_SECONDS)
            show()
    _raise_first(children.errors)
    if stop.requested or children.errors:
        raise Interrupted(f"stopped with {children.finished} of {len(runs)} runs finished")


@dataclass(frozen=True, kw_only=True)
class _Child:
    folder: Path
    process: SpawnProcess
    outcome: Connection


class _Children:
    """Processes that train, one per run; leaving the context stops those that still run and waits for them.

    Attributes:
        waiting: Runs that have not started.
        running: Processes that have not ended.
        finished: Number of runs that ended well.
        errors: Of the others, in the order in which they ended.
    """

    def __init__(self, runs: Mapping[Path, RunConfig], threads: int) -> None:
        self.waiting, self.threads = list(runs.items()), threads
        self.running: list[_Child] = []
        self.finished, self.stopped = 0, False
        self.errors: list[Exception] = []

    def __enter__(self) -> _Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        while self.running:
            self.wait(None)

    def start(self, workers: int) -> None:
        """Starts runs until `workers` are running."""
        resource_tracker.ensure_running()  # starting it later would unblock the signal again
        while self.waiting and len(self.running) < workers:
            folder, config = self.waiting.pop(0)
            receiver, sender = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.get_context("spawn").Process(
                target=_train_one, args=(config, folder, self.threads, sender), name=folder.name
            )
            # Inherited: Ctrl-C reaches the whole terminal, but it is this process that tells the others to stop.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            sender.close()  # so that the end of the process ends the pipe
            self.running.append(_Child(folder=folder, process=process, outcome=receiver))

    def stop(self) -> None:
        """Tells all to save and stop, once; one that does not train yet just ends."""
        if not self.stopped:
            self.stopped = True
            for child in self.running:
                child.process.terminate()

    def wait(self, timeout: float | None) -> None:
        """Collects what ended, waiting up to `timeout` seconds for something to end."""
        ended = connection.wait([child.outcome for child in self.running], timeout)
        for child in [child for child in self.running if child.outcome in ended]:
            self.running.remove(child)
            error = self._end(child)
            if error is None:
                self.finished += 1
            else:
                self.errors.append(error)

    def _end(self, child: _Child) -> Exception | None:
        try:
            error: Exception | None = child.outcome.recv()
        except EOFError:
            child.process.join()
            if self.stopped and child.process.exitcode == -signal.SIGTERM:
                error = Interrupted(f"{child.folder} was stopped outside of its steps")
            else:
                error = LostProcessError(
                    f"the process of run {child.folder} ended with exit code {child.process.exitcode} (-9: killed, "
                    "perhaps for want of memory); what it saved is kept, run the same again to continue it"
                )
        child.process.join()
        child.outcome.close()
        return error


def _train_one(config: RunConfig, folder: Path, threads: int, outcome: Connection) -> None:
    """Trains one run in a process of its own and sends None or the error."""
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        train(config, folder, resume=(folder / CONFIG).exists(), progress=False)
    except _REPORTED as error:
        outcome.send(error)
    else:
        outcome.send(None)


def _stop_with_parent() -> None:
    """Waits for the end of the parent, however it ends, and then tells this process to save and stop."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _raise_first(errors: list[Exception]) -> None:
    """Raises the error that says most, of a run before that of a lost process; a run that was stopped has none."""
    for kinds in ((ValueError, OSError, FloatingPointError), LostProcessError):
        for error in errors:
            if isinstance(error, kinds):
                raise error


@contextmanager
def _bars(runs: Mapping[Path, RunConfig], progress: bool) -> Iterator[Callable[[], None]]:
    """Shows a bar per run; yields what brings them up to date."""
    bars = step_bars(shown=progress)
    tasks = {folder: bars.add_task(folder.name, total=config.max_steps, figures="") for folder, config in runs.items()}

    def show() -> None:
        for folder, task in tasks.items():
            lines = read_metrics(folder, "train") if (folder / METRICS).exists() else []
            if lines:
                last = lines[-1]
                figures = f"loss {last['loss']:.3f}  {last['pairs_per_second']:.0f} pairs/s"
                bars.update(task, completed=last["step"], figures=figures)

    with bars:
        yield show
