"""Shares of cores, and processes that are killed or fail; those of a server are in test_cli_serve.py."""

import os
import signal
import time
from functools import partial

import pytest

from bridgetower.serve import replicas
from bridgetower.serve.replicas import share, supervise


@pytest.mark.parametrize(("cores", "sizes"), [(4, [2, 2]), (5, [2, 3]), (7, [2, 2, 3]), (3, [1] * 3)])
def test_every_core_is_in_one_share(cores, sizes):
    shares = [share(range(10, 10 + cores), number, len(sizes)) for number in range(len(sizes))]
    assert list(map(len, shares)) == sizes
    assert [core for part in shares for core in part] == list(range(10, 10 + cores))
    with pytest.raises(ValueError, match=f"replicas is {cores + 1}, and there are {cores} cores; expected {cores}"):
        share(range(cores), 0, cores + 1)


def killed_once(starts, replica):
    with starts.open("a") as file:
        file.write(f"{time.time()}\n")
    if len(starts.read_text().split()) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit(2)


def test_a_killed_replica_starts_again_after_a_pause_and_one_that_fails_ends_all(tmp_path, monkeypatch):
    monkeypatch.setattr(replicas, "_PAUSE", 1.0)
    starts = tmp_path / "starts"
    with pytest.raises(SystemExit) as ended:
        supervise(1, partial(killed_once, starts))
    assert ended.value.code == 2
    first, second = map(float, starts.read_text().split())
    assert second - first > 0.4  # a little less than the pause where the second process starts more quickly
