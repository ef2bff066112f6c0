"""Several processes that serve one model at one port; importable without torch and without the web libraries."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

logger = logging.getLogger(__name__)

_METRICS = "PROMETHEUS_MULTIPROC_DIR"
_PAUSE = 5.0  # seconds at least from one start of a replica to its next
_ARENA_MAX, _ARENAS = -8, 2  # its number in malloc.h; pools of memory


class Replica(NamedTuple):
    """A process among those that serve a model, from 0, which all write their metrics to one folder."""

    number: int
    total: int
    metrics: str

    def settle(self) -> None:
        """Takes a share of the cores and a place for metrics, before torch and the web libraries are imported."""
        os.environ[_METRICS] = self.metrics
        cores = share(_cores(), self.number, self.total)
        os.environ.setdefault("OMP_NUM_THREADS", str(len(cores)))
        if sys.platform == "linux":
            os.sched_setaffinity(0, cores)
        os.setsid()
        parent = multiprocessing.parent_process()
        assert parent is not None

        def end_with_parent() -> None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=end_with_parent, daemon=True).start()

    def device(self, given: str | None) -> str | None:
        """Returns the device of this process: a GPU in turn if the model is to run on one."""
        import torch

        if given not in (None, "auto", "cuda") or not torch.cuda.is_available():
            return given
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
        raise ValueError(f"replicas is {count}, and there are {len(cores)} cores; expected {len(cores)} or fewer")
    return cores[number * len(cores) // count : (number + 1) * len(cores) // count]


def supervise(count: int, target: Callable[[Replica], None]) -> None:
    """Runs a function in several processes until SIGTERM or Ctrl-C; one that is killed is replaced after a pause."""
    from prometheus_client.multiprocess import mark_process_dead

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    share(_cores(), 0, count)
    before = signal.signal(signal.SIGTERM, leave)
    with TemporaryDirectory(prefix="bridgetower-metrics-") as folder:
        replicas = [Replica(number, count, folder) for number in range(count)]
        processes: dict[Replica, SpawnProcess] = {}
        due = dict.fromkeys(replicas, 0.0)  # when it may start
        try:
            while True:
                for replica in replicas:
                    if replica not in processes and due[replica] <= time.monotonic():
                        context = multiprocessing.get_context("spawn")
                        processes[replica] = context.Process(target=target, args=(replica,), daemon=True)
                        processes[replica].start()
                        due[replica] = time.monotonic() + _PAUSE
                pauses = [due[replica] - time.monotonic() for replica in replicas if replica not in processes]
                wait([process.sentinel for process in processes.values()], min(pauses, default=None))
                for replica in [replica for replica, process in processes.items() if not process.is_alive()]:
                    process = processes.pop(replica)
                    process.join()
                    _mark(folder, process.pid).unlink(missing_ok=True)
                    mark_process_dead(process.pid, folder)  # type: ignore[no-untyped-call]
                    status = process.exitcode or 0
                    if status >= 0:
                        raise SystemExit(status or 1)
                    logger.error("replica %d was killed by signal %d; it is started again", replica.number + 1, -status)
        finally:
            signal.signal(signal.SIGTERM, before)
            for process in processes.values():
                process.terminate()
            for process in processes.values():
                process.join()


def _cores() -> Sequence[int]:
    """Those that this process may use, where the system gives them; else those of the machine."""
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else range(os.cpu_count() or 1)
