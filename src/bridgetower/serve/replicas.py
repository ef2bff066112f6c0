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
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory

logger = logging.getLogger(__name__)

_PAUSE = 5.0  # seconds at least from one start of a replica to its next
_ARENA_MAX, _ARENAS = -8, 2  # its number in malloc.h; pools of memory


@dataclass(frozen=True)
class Replica:
    """A process among those that serve a model, from 0, which all write their metrics to one folder."""

    number: int
    count: int
    metrics: Path

    def settle(self) -> None:
        """Takes a share of the cores and a place for metrics; call it before torch and the web libraries are imported.

        The process ends when the one that started it does. Ctrl-C is left to that one.
        """
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(self.metrics)
        cores = share(_cores(), self.number, self.count)
        os.environ.setdefault("OMP_NUM_THREADS", str(len(cores)))
        if sys.platform == "linux":
            os.sched_setaffinity(0, cores)
        os.setsid()
        threading.Thread(target=_end_with_parent, daemon=True).start()

    def device(self, given: str | None) -> str | None:
        """Returns the device of this process: a GPU in turn if the model is to run on one."""
        import torch

        if given not in (None, "cuda") or not torch.cuda.is_available():
            return given
        return f"cuda:{self.number % torch.cuda.device_count()}"


def limit_arenas() -> None:
    """Limits glibc to two memory pools for all threads; other libraries are left as they are.

    By default each thread gets a pool, up to eight for each core, and none returns its free memory to the others. glibc
    reads the limit when it creates the pools, so call this before any thread starts.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_ARENA_MAX, _ARENAS)


def share(cores: Sequence[int], number: int, count: int) -> Sequence[int]:
    """Returns the part of a process among the cores, as even as possible."""
    if count > len(cores):
        raise ValueError(f"replicas is {count}, and there are {len(cores)} cores; expected {len(cores)} or fewer")
    return cores[number * len(cores) // count : (number + 1) * len(cores) // count]


def supervise(count: int, target: Callable[[Replica], None]) -> None:
    """Runs a function in several processes until SIGTERM or Ctrl-C; a process that is killed is replaced.

    One that is killed as soon as it starts, for want of memory for example, is started every five seconds.
    """
    share(_cores(), 0, count)
    before = signal.signal(signal.SIGTERM, _exit)
    with TemporaryDirectory(prefix="bridgetower-metrics-") as folder:
        replicas = [Replica(number, count, Path(folder)) for number in range(count)]
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
                    _bury(replica, processes.pop(replica))
        finally:
            signal.signal(signal.SIGTERM, before)
            for process in processes.values():
                process.terminate()
            for process in processes.values():
                process.join()


def _cores() -> Sequence[int]:
    """Those that this process may use, where the system gives them; else those of the machine."""
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else range(os.cpu_count() or 1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _exit(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _bury(replica: Replica, process: SpawnProcess) -> None:
    """Takes back what a process that ended had; fails as it did, unless it was killed."""
    from prometheus_client.multiprocess import mark_process_dead

    process.join()
    mark_process_dead(process.pid, str(replica.metrics))  # type: ignore[no-untyped-call]
    status = process.exitcode or 0
    if status >= 0:
        raise SystemExit(status or 1)
    logger.error("replica %d was killed by signal %d; it is started again", replica.number + 1, -status)
