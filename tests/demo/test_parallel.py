"""Runs side by side: the results of training one after another, and what happens when one fails or all must stop."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from bridgetower.files import locked
from bridgetower.tasks.run_config import METRICS, RunConfig, read_metrics
from bridgetower.training.run import train
from bridgetower.training.trainer import Interrupted
from bridgetower_demo.parallel import LostProcessError, train_all
from helpers.checkpoints import same_weights, saved_state, state_files
from helpers.shapes import shapes_run_config

pytestmark = pytest.mark.slow

LONG = 10**6  # steps: more than a test waits for
PATIENCE = 300.0  # seconds after which something hangs


def steps_done(run: Path) -> int:
    return len(read_metrics(run, "train")) if (run / METRICS).exists() else 0


def saved_step(run: Path) -> int:
    return saved_state(run).step


@contextmanager
def once(happened: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """Acts in the background as soon as something happened."""
    acted = threading.Event()

    def watch() -> None:
        deadline = time.monotonic() + PATIENCE
        while not happened():
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)
        act()
        acted.set()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield
    watcher.join(PATIENCE)
    assert acted.is_set()


def check_it_goes_on(run: Path, config: RunConfig) -> None:
    """Lets a run that was stopped end two steps after its saved one."""
    assert 0 < saved_step(run) == steps_done(run) < LONG
    short = replace(config, max_steps=saved_step(run) + 2)
    (run / "run.json").write_text(json.dumps(short.to_dict()))
    train_all({run: short}, progress=False)
    assert saved_step(run) == short.max_steps == steps_done(run)


@pytest.fixture
def started_children():
    """The processes that the test has started."""
    before = set(multiprocessing.active_children())
    return lambda: [
        process for process in multiprocessing.active_children() if process not in before
    ]


def test_two_equal_training_one_after_another_and_stay_as_they_are(tmp_path, tiny_dataset):
    runs = {
        tmp_path / f"seed-{seed}": shapes_run_config(tiny_dataset, seed=seed) for seed in (0, 1)
    }
    train_all(runs, progress=False)
    for run, config in runs.items():
        train(config, tmp_path / "alone" / run.name, progress=False)
        assert same_weights(run / "last", tmp_path / "alone" / run.name / "last")
    files = [path for run in runs for path in (run / METRICS, run / "run.json", *state_files(run))]
    before = [path.read_bytes() for path in files]
    train_all(runs, progress=False)
    assert [path.read_bytes() for path in files] == before


def test_one_that_fails_raises_its_error_and_the_other_can_go_on(
    started_children, tmp_path, tiny_dataset
):
    good = shapes_run_config(tiny_dataset, max_steps=LONG)
    bad = shapes_run_config(tiny_dataset, batch_size=4000)
    with pytest.raises(ValueError, match="fewer than one batch of 4000"):
        train_all({tmp_path / "good": good, tmp_path / "bad": bad}, progress=False)
    assert started_children() == []
    if (tmp_path / "good" / METRICS).exists():  # else it had not begun
        check_it_goes_on(tmp_path / "good", good)


def test_a_lost_process_is_named(started_children, tmp_path, tiny_dataset):
    runs = {
        tmp_path / name: shapes_run_config(tiny_dataset, max_steps=LONG)
        for name in ("one", "other")
    }
    with (
        once(
            lambda: all(steps_done(run) > 2 for run in runs), lambda: started_children()[0].kill()
        ),
        pytest.raises(LostProcessError, match="continue it") as error,
    ):
        train_all(runs, progress=False)
    # it was told to stop
    (saved,) = [run for run in runs if 0 < saved_step(run) == steps_done(run) < LONG]
    (lost,) = set(runs) - {saved}
    assert f"the process of run {lost} was lost" in str(error.value)


def test_an_interrupted_one_saves_and_goes_on(started_children, tmp_path, tiny_dataset):
    # at least one has to wait
    names = ("one", "other", "later", "last")[: len(os.sched_getaffinity(0)) + 1]
    runs = {tmp_path / name: shapes_run_config(tiny_dataset, max_steps=LONG) for name in names}
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with (
        once(lambda: steps_done(tmp_path / "one") > 2, lambda: os.kill(os.getpid(), signal.SIGINT)),
        pytest.raises(Interrupted, match=f"stopped with 0 of {len(runs)} runs finished"),
    ):
        train_all(runs, progress=False)
    assert started_children() == []
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert not (tmp_path / names[-1]).exists() or len(names) == 4
    check_it_goes_on(tmp_path / "one", runs[tmp_path / "one"])


def train_alone(dataset: Path, out: Path) -> None:
    train_all({out: shapes_run_config(dataset, max_steps=LONG)}, progress=False)


def test_no_run_outlives_its_parent(tmp_path, tiny_dataset):
    parent = multiprocessing.get_context("forkserver").Process(
        target=train_alone, args=(tiny_dataset, tmp_path / "run")
    )
    parent.start()
    with once(lambda: steps_done(tmp_path / "run") > 2, parent.kill):
        parent.join()
    deadline = time.monotonic() + PATIENCE
    while not saved_step(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert 0 < saved_step(tmp_path / "run") < LONG  # checkpoints are rarer: it was told to stop
    with locked(tmp_path / "run", wait=True):  # held until its process ends
        assert steps_done(tmp_path / "run") == saved_step(tmp_path / "run")
