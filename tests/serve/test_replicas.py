"""Shares of cores, and processes that are killed or fail. Those of a server are in test_cli_serve.py."""

import os
import signal
import time
from functools import partial
from multiprocessing.context import ForkServerProcess

import pytest

from bridgetower.serve.replicas import pause_after, share, supervise


@pytest.mark.parametrize(
    ("cores", "sizes"), [(4, [2, 2]), (5, [2, 3]), (7, [2, 2, 3]), (3, [1] * 3)]
)
def test_every_core_is_in_one_share(cores, sizes):
    shares = [share(range(10, 10 + cores), number, len(sizes)) for number in range(len(sizes))]
    assert list(map(len, shares)) == sizes
    assert [core for share in shares for core in share] == list(range(10, 10 + cores))
    with pytest.raises(
        ValueError, match=f"replicas is {cores + 1}, and there are {cores} cores; expected {cores}"
    ):
        share(range(cores), 0, cores + 1)


@pytest.mark.parametrize(
    ("deaths", "seconds"), [(0, 0), (1, 0), (2, 1), (3, 2), (5, 8), (8, 64), (5000, 64)]
)
def test_replicas_that_die_young_again_and_again_pause_longer(deaths, seconds):
    assert pause_after(deaths) == seconds


def test_the_process_that_starts_replicas_may_be_killed(monkeypatch):
    def start(process):
        raise EOFError("unexpected EOF")

    monkeypatch.setattr(ForkServerProcess, "start", start)
    with pytest.raises(ChildProcessError, match="the process that starts replicas was killed"):
        supervise(1, killed_twice)


def killed_twice(starts, replica):
    with starts.open("a") as file:
        file.write(f"{time.time()}\n")
    if len(starts.read_text().split()) <= 2:
        os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit(2)


def test_a_killed_replica_starts_again_after_a_pause_if_that_repeats_and_one_that_fails_ends_all(
    tmp_path, caplog
):
    starts = tmp_path / "starts"
    with pytest.raises(SystemExit) as ended:
        supervise(1, partial(killed_twice, starts))
    assert ended.value.code == 2
    _, second, third = map(float, starts.read_text().split())
    assert third - second >= 1
    assert [record.message.rpartition("again ")[2] for record in caplog.records] == [
        "now",
        "in 1 s",
    ]
