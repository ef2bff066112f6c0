"""A signal to all processes of a run, data workers included, as launchers and schedulers send it: the run is saved."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import states
from bridgetower.tasks.run_config import METRICS, read_metrics
from shapes import train_command

PATIENCE = 300.0  # seconds after which something hangs


def stopped(launcher: list[str], dataset: Path, out: Path, number: signal.Signals) -> tuple[int, str]:
    """Sends a signal to the group of a run with data workers in the middle; returns its exit code and its errors."""
    options = ("--data.num-workers", "1", "--max-steps", "100000", "--checkpoint-every", "100000")
    with subprocess.Popen(
        [sys.executable, "-m", *launcher, *train_command(dataset, out, *options)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while not (out / METRICS).exists() or len(read_metrics(out, "train")) < 3:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            os.killpg(process.pid, number)
            _, error = process.communicate(timeout=PATIENCE)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, error


def test_a_process_with_workers(tiny_dataset: Path, tmp_path: Path) -> None:
    code, error = stopped(["bridgetower"], tiny_dataset, tmp_path / "run", signal.SIGINT)
    assert code == 128 + signal.SIGINT, error
    assert "Traceback" not in error
    assert states.saved(tmp_path / "run").step == read_metrics(tmp_path / "run", "train")[-1]["step"]


@pytest.mark.slow
def test_two_processes_with_workers(tiny_dataset: Path, tmp_path: Path) -> None:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bridgetower"]
    _, error = stopped(launcher, tiny_dataset, tmp_path / "run", signal.SIGTERM)
    assert "of 100000; --resume continues it" in error
    assert states.saved(tmp_path / "run").step == read_metrics(tmp_path / "run", "train")[-1]["step"]
