"""`torchrun … -m bridgetower train`: two processes, one run; stopped and continued it ends with the same bits."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import asked
import kills
from bridgetower import cli
from bridgetower.training.logs import read_metrics
from bridgetower.training.run import STATE, read_run, train
from folders import same_weights
from shapes import train_command

pytestmark = pytest.mark.slow

STEPS = 40
PATIENCE = 900.0  # seconds after which something hangs


def start(
    dataset: Path, out: Path, *options: str, program: Sequence[str] = ("-m", "bridgetower")
) -> subprocess.Popen[str]:
    """Starts torchrun with two processes, each on one thread."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = train_command(dataset, out, "--max-steps", str(STEPS), "--evaluate-every", "15", *options)
    return subprocess.Popen(
        [*launcher, *program, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Returns exit code and output; what hangs is ended with all its processes."""
    try:
        out, error = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torchrun")


@pytest.fixture(scope="module")
def whole(tiny_dataset: Path, folder: Path) -> tuple[int, str, str]:
    return finish(start(tiny_dataset, folder / "whole"))


@pytest.fixture(scope="module")
def stopped(tiny_dataset: Path, folder: Path) -> tuple[int, str, str]:
    """A run that torchrun was asked to stop when it was about to save what it evaluated first."""
    program = (kills.__file__, "*/best/config.json", "1", "SIGTERM", "parent")
    return finish(start(tiny_dataset, folder / "stopped", program=program))


@pytest.fixture(scope="module")
def resumed(tiny_dataset: Path, folder: Path, stopped: tuple[int, str, str]) -> tuple[int, str, str]:
    assert 0 < torch.load(folder / "stopped" / STATE, weights_only=True)["state"]["step"] < STEPS
    return finish(start(tiny_dataset, folder / "stopped", "--resume"))


def test_one_result_and_one_log(whole: tuple[int, str, str], folder: Path) -> None:
    code, out, error = whole
    assert code == 0, error
    (line,) = out.splitlines()
    assert json.loads(line)["run"] == str(folder / "whole")
    assert [entry["step"] for entry in read_metrics(folder / "whole", "train")] == list(range(1, STEPS + 1))
    assert [entry["step"] for entry in read_metrics(folder / "whole", "validation")] == [15, 30, STEPS]
    assert len(list((folder / "whole").rglob("*.jsonl"))) == 1


def test_stopping_saves_and_is_said(stopped: tuple[int, str, str]) -> None:
    code, out, error = stopped
    assert code != 0
    assert out == ""
    assert f"of {STEPS}; --resume continues it" in error


def test_continued_it_ends_with_the_same_bits(
    whole: tuple[int, str, str], resumed: tuple[int, str, str], folder: Path
) -> None:
    code, _, error = resumed
    assert code == 0, error
    for checkpoint in ("last", "best"):
        assert same_weights(folder / "whole" / checkpoint, folder / "stopped" / checkpoint)
    assert [entry["step"] for entry in read_metrics(folder / "stopped", "train")] == list(range(1, STEPS + 1))


def test_another_number_of_processes_is_refused(resumed: tuple[int, str, str], folder: Path) -> None:
    out = folder / "stopped"
    with pytest.raises(ValueError, match="result: number of processes was 2, now 1; put this back"):
        train(read_run(out), out, resume=True, progress=False)


def test_evaluation_in_two_processes_is_that_of_one(answering_checkpoint: Path, tmp_path: Path) -> None:
    asked.write_set(tmp_path / "set", "nlvr2")
    command = ["evaluate", str(answering_checkpoint), "nlvr2", "--data", str(tmp_path / "set"), "--split", "validation"]
    options = ["--device", "cpu", "--batch-size", "2", "--out"]
    cli.main([*command, *options, str(tmp_path / "one")])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "bridgetower", *command, *options, str(tmp_path / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    reports = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert json.loads(line) == reports[1] == reports[0]
    for name in ("submission.csv", "predictions.jsonl"):
        one, two = ((tmp_path / folder / name).read_text() for folder in ("one", "two"))
        assert one.count("\n") == two.count("\n") == 5
        assert name.endswith("jsonl") or one == two
