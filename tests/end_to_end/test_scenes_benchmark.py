"""The benchmark of scenes from data to table, a few steps of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "scenes.py"

pytestmark = pytest.mark.slow  # three trainings, each in a process of its own


def run(task: str, out: Path) -> str:
    sizes = {"steps": 2, "batch-size": 4, "num-train": 32, "num-validation": 4, "num-test": 8, "seeds": 1}
    options = [f"--{name}={size}" for name, size in sizes.items()]
    done = subprocess.run(
        [sys.executable, BENCHMARK, task, "--out", out, *options], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_trains_measures_and_draws(tmp_path: Path) -> None:
    printed = run("nlvr2", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["steps"] == 2
    assert set(results["arms"]) == {"BridgeTower", "METER", "METER with LayerNorms"}
    for arm in results["arms"].values():
        assert set(arm["test"]) == {"both", "one", "more", "sum", "overall"}
        assert arm["test"]["overall"]["number"] == 8
        assert [len(arm["test"]["both"][name]["values"]) for name in ("model", "other_image", "text_only")] == [1] * 3
        assert list(arm["curve"]) == ["1", "2"]
        assert len(arm["seconds"]) == 1
    assert len(list((tmp_path / "runs").glob("*/last/model.safetensors"))) == 3
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 500
    assert printed.count("\n| ") == 5  # a line for each topic
