"""Attempts at a command, each in a forked process: left alone, killed after a time, on a full or read-only disk.

Forks start in milliseconds, so that kills meet the work and not the imports. What is mounted is seen by the fork alone.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bridgetower import cli

PATIENCE = 300.0  # seconds after which an attempt hangs
GRACE = 30.0  # seconds that torchrun gives processes to end when another one has failed

Around = AbstractContextManager[object]

_NEW_MOUNTS = 0x0002_0000
_NEW_USER = 0x1000_0000
_PRIVATE = 1 << 14 | 1 << 18
_READ_ONLY = 1  # of all mounts below


@dataclass(frozen=True)
class Ended:
    """How an attempt ended.

    Attributes:
        codes: Exit code of each process, or minus the signal.
        seconds: It took.
        said: What its processes wrote.
    """

    codes: tuple[int, ...]
    seconds: float
    said: str

    @property
    def done(self) -> bool:
        """Whether it came to its end."""
        return not any(self.codes)

    @property
    def killed(self) -> bool:
        """Whether a kill met it."""
        return -signal.SIGKILL in self.codes

    @property
    def refused(self) -> bool:
        """Whether it ended with one line for the user."""
        return 2 in self.codes and "bridgetower: " in self.said and "Traceback" not in self.said


@dataclass(frozen=True)
class Kill:
    """A kill of some processes, so many seconds after their start."""

    seconds: float
    victims: Sequence[int] = (0,)


class Attempt:
    """Processes that run a command."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        processes: int = 1,
        around: Callable[[], Around] = nullcontext,
    ) -> None:
        """Starts them.

        Args:
            command: Arguments of `bridgetower`.
            log: What they write goes here.
            processes: One, or the processes of a run as torchrun starts them.
            around: Gives what the command runs within, in each process.
        """
        self.log, self.started = log, time.perf_counter()
        self._start = log.stat().st_size if log.exists() else 0
        worlds = _worlds(processes)
        self.pids = [
            in_fork(partial(_run_command, command, world, around), log) for world in worlds
        ]

    def end(self, kill: Kill | None = None) -> Ended:
        """Waits until all have ended.

        Raises:
            TimeoutError: They hang; they are killed.
        """
        if kill is not None:
            time.sleep(max(0.0, self.started + kill.seconds - time.perf_counter()))
            for victim in kill.victims:
                # one that has ended is a zombie until it is waited for
                os.kill(self.pids[victim], signal.SIGKILL)
        codes = self._wait()
        # a kill may come before it is there
        content = self.log.read_bytes() if self.log.exists() else b""
        text = content[self._start :].decode(errors="replace")
        return Ended(codes, time.perf_counter() - self.started, text)

    def _wait(self) -> tuple[int, ...]:
        """Waits for all processes. When one fails the others are ended, as torchrun does."""
        codes: dict[int, int] = {}
        deadline = time.perf_counter() + PATIENCE
        ending = signal.SIGTERM
        while len(codes) < len(self.pids):
            for pid in self.pids:
                ended, status = (0, 0) if pid in codes else os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            if ending == signal.SIGTERM and any(codes.values()):
                self._signal(codes, ending)
                deadline = time.perf_counter() + GRACE
                ending = signal.SIGKILL
            if time.perf_counter() > deadline:
                self._signal(codes, signal.SIGKILL)
                if ending == signal.SIGTERM:
                    raise TimeoutError(f"an attempt hung; see {self.log}")
                deadline = math.inf
            time.sleep(0.002)
        return tuple(codes[pid] for pid in self.pids)

    def _signal(self, ended: Container[int], number: signal.Signals) -> None:
        for pid in self.pids:
            if pid not in ended:
                os.kill(pid, number)


def in_fork(work: Callable[[], None], log: Path) -> int:
    """Starts a process that does some work and writes to a log. Returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        work()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        if code == 1:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _worlds(processes: int) -> list[Mapping[str, str]]:
    """Environment that torchrun gives each process. A single one gets none."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    size = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "TORCHELASTIC_RUN_ID": "faults",
    }
    return [
        {**address, **size, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)
    ]


def _run_command(
    command: Sequence[str], world: Mapping[str, str], around: Callable[[], Around]
) -> None:
    os.environ.update(world)
    with around() as mounted:
        if mounted:  # which threads that a library starts again in each fork would not see
            sys.exit(subprocess.call([sys.executable, "-m", "bridgetower", *command]))
        cli.main(command)


def why_not_mounted() -> str | None:
    """Returns why no file system can be mounted here, or None if one can."""
    if sys.platform != "linux":
        return "this needs Linux"
    with tempfile.TemporaryDirectory() as folder:
        pid = in_fork(lambda: _mount(Path(folder), 64), Path(os.devnull))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if code == 0 else "this process may not mount a file system of its own"


@contextmanager
def on_small_disk(folder: Path, kib: int, outside: Path) -> Iterator[bool]:
    """Mounts a file system of so many KiB on a folder, for this process. In the end its content is copied."""
    _mount(folder, kib)
    try:
        yield True
    finally:
        shutil.copytree(folder, outside, dirs_exist_ok=True)


@contextmanager
def read_only(folder: Path) -> Iterator[bool]:
    """Mounts a file system that cannot be written to on a folder, for this process."""
    _mount(folder, 64, _READ_ONLY)
    yield True


def _mount(folder: Path, kib: int, flags: int = 0) -> None:
    """Mounts a file system on a folder, which only this process sees. It must have one thread.

    Raises:
        OSError: That is not allowed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    uid = os.geteuid()
    gid = os.getegid()
    _check(libc.unshare(_NEW_MOUNTS | (_NEW_USER if uid else 0)))
    if uid:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    _check(libc.mount(b"none", b"/", None, _PRIVATE, None))
    _check(
        libc.mount(
            b"tmpfs", str(folder).encode(), b"tmpfs", flags, f"size={kib}k,mode=777".encode()
        )
    )


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
