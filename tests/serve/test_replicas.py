"""Shares of cores; the processes themselves are in test_cli_serve.py."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from bridgetower.serve import replicas
from bridgetower.serve.replicas import Replica, share, supervise


@pytest.mark.parametrize(
    ("cores", "count", "sizes"), [(4, 2, [2, 2]), (5, 2, [2, 3]), (7, 3, [2, 2, 3]), (3, 3, [1] * 3)]
)
def test_every_core_is_in_one_share(cores: int, count: int, sizes: list[int]) -> None:
    shares = [share(range(10, 10 + cores), number, count) for number in range(count)]
    assert list(map(len, shares)) == sizes
    assert [core for part in shares for core in part] == list(range(10, 10 + cores))


def test_too_few_cores() -> None:
    with pytest.raises(ValueError, match="replicas is 3, and there are 2 cores; expected 2 or fewer"):
        share([0, 1], 0, 3)


def killed_once(starts: Path, replica: Replica) -> None:
    """A replica that is killed when it starts for the first time, and ends when it starts again."""
    with starts.open("a") as file:
        file.write(f"{time.time()}\n")
    if len(starts.read_text().split()) == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_replica_that_is_killed_at_its_start_is_not_started_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "_PAUSE", 2.0)
    starts = tmp_path / "starts"
    with pytest.raises(SystemExit):
        supervise(1, partial(killed_once, starts))
    first, second = map(float, starts.read_text().split())
    assert second - first > 1.0  # a little less than the pause where the second process starts more quickly
