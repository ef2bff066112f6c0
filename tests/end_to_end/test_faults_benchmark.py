"""The benchmark of kills and other faults, a few of each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "faults.py"

pytestmark = pytest.mark.slow  # trainings


def test_a_few_faults(tmp_path: Path) -> None:
    options = ["--kills", "4", "--jobs", "prepare", "train", "--pictures", "60", "--out", tmp_path / "faults.json"]
    done = subprocess.run([sys.executable, BENCHMARK, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "faults.json").read_text())
    for row in found["kills"]:
        assert (row["kills"], row["resumed"], row["beyond"], row["errors"]) == (2, 2, 0, [])
        assert row["equal"] == row["ends"] > 0
    assert len(found["faults"]) == 6
    for row in found["faults"]:
        expected = ("done and refused", "done and done") if row["fault"] == "two writers" else ("refused",)
        assert row["seen"].startswith("not run") or (row["seen"] in expected and row["equal"])
    assert done.stdout.count("\n| ") == 2 + 3 + 1 + 6
