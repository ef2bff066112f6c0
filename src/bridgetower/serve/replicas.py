"""Processes that serve one model at one port, importable without torch and without the web libraries."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

logger = logging.getLogger(__name__)

_METRICS = "PROMETHEUS_MULTIPROC_DIR"
_YOUNG_SECONDS = 60.0  # a replica that was killed sooner may be so each time
_MOST_DOUBLINGS = 6  # of the pause from a death to the next start, which is a second at first
_ARENA_MAX = -8  # in malloc.h
_ARENAS = 2


class Replica(NamedTuple):
    """A process among those that serve a model, from 0, which all write their metrics to one folder."""

    number: int
    total: int
    metrics: str

    def settle(self) -> None:
        """Takes a share of the cores and a place for metrics, before the web libraries are imported."""
        import torch

        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        os.environ[_METRICS] = self.metrics
        cores = share(_cores(), self.number, self.total)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(len(cores))
        if sys.platform == "linux":
            os.sched_setaffinity(0, cores)
        os.setsid()
        parent = parent_process()
        assert parent is not None

        def end_with_parent() -> None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=end_with_parent, daemon=True).start()

    def device(self, device: str | None) -> str | None:
        """Returns the device of this process: its own GPU if the model is to run on one."""
        import torch

        if device not in (None, "auto", "cuda") or not torch.cuda.is_available():
            return device
        return f"cuda:{self.number % torch.cuda.device_count()}"


def limit_arenas() -> None:
    """Limits glibc to two pools of memory for all threads, before any starts: no pool gives free memory to others."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_ARENA_MAX, _ARENAS)


def mark_listening() -> None:
    """Tells the other replicas that this one listens."""
    if folder := os.environ.get(_METRICS):
        _mark(folder, os.getpid()).touch()


def all_listen(count: int) -> bool:
    """Whether as many replicas listen as there are to be."""
    return count == 1 or len(list(Path(os.environ[_METRICS]).glob("listening-*"))) == count


def _mark(folder: str, process: int | None) -> Path:
    return Path(folder, f"listening-{process}")


def wait_passively() -> None:
    """Lets threads of a computation sleep when they wait, before torch is imported: else they hold cores from others.

    Texts are computed beside images, and one computation's waiting threads would slow the other down.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def share(cores: Sequence[int], number: int, count: int) -> Sequence[int]:
    if count > len(cores):
        raise ValueError(
            f"replicas is {count}, and there are {len(cores)} cores; expected {len(cores)} or fewer"
        )
    return cores[number * len(cores) // count : (number + 1) * len(cores) // count]


def pause_after(deaths: int) -> float:
    """Returns the seconds from the last of several early deaths in a row to the next start: none for the first."""
    return 0.0 if deaths <= 1 else 2.0 ** min(deaths - 2, _MOST_DOUBLINGS)


class _Slot:
    """The current process of a replica, which is replaced after it was killed."""

    def __init__(self, replica: Replica, target: Callable[[Replica], None]) -> None:
        self.replica = replica
        self._target = target
        self.process: ForkServerProcess | None = None
        self.due = 0.0  # when the next one may start
        self._started = 0.0
        self._early_deaths = 0

    def start(self) -> None:
        """Starts a process, by the server of multiprocessing, which outlives SIGTERM to the whole group."""
        process = get_context("forkserver").Process(
            target=self._target, args=(self.replica,), daemon=True
        )
        # The server inherits the mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            process.start()
        except EOFError as error:
            message = "the process that starts replicas was killed; perhaps memory ran short: start the server again"
            raise ChildProcessError(message) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.process = process
        self._started = time.monotonic()

    def clear(self) -> None:
        """Makes room for another process after one that was killed. The status of one that ended is raised."""
        from prometheus_client.multiprocess import mark_process_dead

        process = self.process
        assert process is not None
        assert process.pid is not None
        self.process = None
        process.join()
        _mark(self.replica.metrics, process.pid).unlink(missing_ok=True)
        mark_process_dead(process.pid, self.replica.metrics)  # type: ignore[no-untyped-call]
        status = process.exitcode or 0
        if status >= 0:
            raise SystemExit(status or 1)

        now = time.monotonic()
        died_early = now - self._started < _YOUNG_SECONDS
        self._early_deaths = self._early_deaths + 1 if died_early else 0
        pause = pause_after(self._early_deaths)
        self.due = now + pause
        when = f"in {pause:g} s" if pause else "now"
        number = self.replica.number + 1
        logger.error(
            "replica %d was killed by signal %d; it is started again %s", number, -status, when
        )


def supervise(count: int, target: Callable[[Replica], None], modules: Sequence[str] = ()) -> None:
    """Runs a function in several processes until SIGTERM or Ctrl-C, and replaces killed ones.

    Args:
        count: Number of processes.
        target: Function, which takes the place of a process among the others.
        modules: Imported once, so that all processes, also those that replace others, have them when they start.
    """

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    share(_cores(), 0, count)
    before = signal.signal(signal.SIGTERM, leave)
    with TemporaryDirectory(prefix="bridgetower-metrics-") as folder:
        os.environ[_METRICS] = folder  # before the web libraries are imported
        get_context("forkserver").set_forkserver_preload([*modules])
        slots = [_Slot(Replica(number, count, folder), target) for number in range(count)]
        try:
            while True:
                for slot in slots:
                    if slot.process is None and slot.due <= time.monotonic():
                        slot.start()
                # Wait until a replica dies or another is due.
                pauses = [slot.due - time.monotonic() for slot in slots if slot.process is None]
                running = [slot.process for slot in slots if slot.process is not None]
                wait([process.sentinel for process in running], min(pauses, default=None))
                for slot in slots:
                    if slot.process is not None and not slot.process.is_alive():
                        slot.clear()
        finally:
            signal.signal(signal.SIGTERM, before)
            del os.environ[_METRICS]
            running = [slot.process for slot in slots if slot.process is not None]
            for process in running:
                process.terminate()
            for process in running:
                process.join()


def _cores() -> Sequence[int]:
    """Returns the cores that this process may use, where the system tells them, else all cores."""
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)
