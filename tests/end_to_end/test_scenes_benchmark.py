"""The benchmarks of scenes and of bridges from data to table, a few steps of each."""

import json
import runpy
import subprocess
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from bridgetower.reports.comparison import Comparison, FinishedRun
from bridgetower_demo.recipes import RECIPES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.slow  # trainings, each in a process of its own


@pytest.fixture
def run(forked: Path) -> Callable[..., str]:
    def call(name: str, *arguments: str | Path, **sizes: int) -> str:
        options = [f"--{size.replace('_', '-')}={value}" for size, value in sizes.items()]
        command = [forked / "python", BENCHMARKS / name, *arguments, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return call


def test_trains_measures_and_draws(run: Callable[..., str], tmp_path: Path) -> None:
    sizes = {"steps": 2, "batch_size": 4, "num_train": 32, "num_validation": 4, "num_test": 8, "seeds": 1}
    printed = run("scenes.py", "nlvr2", "--out", tmp_path, **sizes)
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


def test_bridges_are_measured_with_the_recipe_of_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    model = runpy.run_path(str(BENCHMARKS / "bridges.py"))["model"]
    assert model(6) == RECIPES["scenes-vqa-deep"].model != model(4)


def test_the_drawing_over_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a lead that grows with the depth, the drawing is another one than without a lead."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = runpy.run_path(str(BENCHMARKS / "bridges.py"))

    def drawn(lead: float) -> bytes:
        compared = {
            depth: Comparison(
                metric="vqa_score",
                reach=None,
                runs=tuple(
                    FinishedRun(
                        arm=arm, seed=seed, curve={1: seed + lead * depth * (arm == "BridgeTower")}, seconds_per_step=1
                    )
                    for arm in benchmark["ARMS"]
                    for seed in (1, 2, 4)
                ),
            )
            for depth in benchmark["TEXT_LAYERS"]
        }
        content: bytes = benchmark["draw_depths"](compared)
        return content

    with Image.open(BytesIO(drawn(1))) as drawing:
        assert drawing.width > 500
    assert drawn(1) != drawn(0)


def test_bridges_keep_finished_runs(run: Callable[..., str], tmp_path: Path) -> None:
    """The arms that two experiments share are trained once; the second call trains nothing."""
    results, work = tmp_path / "bridges.json", tmp_path / "work"
    sizes = {"steps": 2, "every": 1, "batch_size": 4, "num_train": 32, "num_validation": 4, "seeds": 1}
    first = run("bridges.py", "depth-2", "--work", work, "--results", results, **sizes)
    assert first.count("\nBridgeTower") + first.count("| BridgeTower \u2212 METER") >= 1
    kept = json.loads(results.read_text())
    assert len(kept) == 3
    assert [list(run["curve"]) for run in kept.values()] == 3 * [["1", "2"]]
    (work / "data").rename(work / "gone")
    assert run("bridges.py", "depth-2", "--work", work, "--results", results, **sizes) == first
    with Image.open(work / "depth-2" / "curves.png") as drawing:
        assert drawing.width > 500
