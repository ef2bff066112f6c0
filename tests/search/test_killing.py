"""SIGKILL at random moments: the index always opens, and the next run completes it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def report(tiny_checkpoint: Path, shapes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("killing")
    shutil.copytree(shapes_folder, folder / "photos")
    script = Path(__file__).with_name("killing.py")
    done = subprocess.run(
        [sys.executable, script, tiny_checkpoint, folder / "photos", folder],
        env=os.environ | {"PYTHONWARNINGS": "ignore"},  # LanceDB warns of forks
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def test_runs_end_well_where_they_may(report: dict[str, Any]) -> None:
    assert (report["first"], report["completed"], report["fresh"]) == (0, 0, 0)
    assert {kill["ended"] for kill in report["kills"]} == {-signal.SIGKILL}


def test_the_index_opens_after_every_kill(report: dict[str, Any]) -> None:
    found = [kill["rows"] for kill in report["kills"]]
    assert None not in found
    assert len(set(found)) > 1  # kills came at different moments


def test_the_next_run_completes_it(report: dict[str, Any]) -> None:
    assert report["rows"] == 45
    assert report["equal"]
    assert not report["left_equal"]  # the control: there was something to complete
