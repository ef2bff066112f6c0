"""What decides the demo's runs; the demo itself runs in end_to_end/test_readme.py and end_to_end/test_demo.py."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bridgetower.files import locked, read_json
from bridgetower.model.presets import meter
from bridgetower.reports.comparison import Comparison
from bridgetower_demo.folder import trained_model
from bridgetower_demo.plan import FROM_SCRATCH, MINUTES, ON_TOWERS, Plan, Stage
from bridgetower_demo.recipes import RECIPES
from bridgetower_demo.results import ARMS
from bridgetower_demo.run import DEEP_TOWERS, answering_config, demo_config, run_demo

OUT = Path("out")
ROOT = Path(__file__).parents[2]
PLANS = (FROM_SCRATCH, ON_TOWERS)
STAGES = [(plan, stage) for plan in PLANS for stage in plan.stages]


@pytest.mark.parametrize(("plan", "stage"), STAGES)
def test_arms_differ_in_the_model_alone(plan: Plan, stage: Stage) -> None:
    ours, theirs = (demo_config(OUT, plan, stage, arm, 3, MINUTES) for arm in ("bridgetower", "meter"))
    assert theirs.model == meter(ours.model)
    assert theirs == replace(ours, model=theirs.model, recipe=theirs.recipe, init=theirs.init)


@pytest.mark.parametrize(("plan", "stage"), STAGES)
def test_minutes_scale_the_steps(plan: Plan, stage: Stage) -> None:
    steps = RECIPES[stage.recipes["meter"]].max_steps
    assert demo_config(OUT, plan, stage, "meter", 0, MINUTES).max_steps == steps
    assert demo_config(OUT, plan, stage, "meter", 0, MINUTES / 2).max_steps == steps // 2
    assert demo_config(OUT, plan, stage, "meter", 0, 1e-6).max_steps >= 1


@pytest.mark.parametrize("plan", PLANS)
def test_questions_are_learnt_alike_by_each_arm(plan: Plan) -> None:
    ours, theirs = (answering_config(OUT, plan, arm, 3, 2.0) for arm in ARMS)
    assert theirs == replace(ours, init=theirs.init, model=theirs.model, recipe=theirs.recipe)
    assert (ours.max_steps, ours.seed) == (plan.questions.steps // 5, 3)


def test_questions_start_from_the_pretrained_model_of_each_arm_or_from_nothing() -> None:
    for arm in ARMS:
        assert answering_config(OUT, ON_TOWERS, arm, 3, 2.0).init == str(trained_model(OUT, arm, 3))
        assert answering_config(OUT, FROM_SCRATCH, arm, 3, 2.0).init is None
    ours, theirs = (answering_config(OUT, FROM_SCRATCH, arm, 3, 2.0).model for arm in ARMS)
    assert (ours.vision.num_layers, theirs) == (6, meter(ours))


def test_each_stage_starts_from_the_one_before() -> None:
    first, second = (demo_config(OUT, ON_TOWERS, stage, "meter", 1, MINUTES) for stage in ON_TOWERS.stages)
    assert (first.init, first.vision, first.text) == (None, "out/towers/vision", "out/towers/text")
    assert (second.init, second.vision) == ("out/runs/meter-1-contrastive/last", None)
    assert first.freeze_towers
    assert second.freeze_towers


@pytest.mark.parametrize(("minutes", "seeds"), [(0, 1), (-1, 1), (1, 0)])
def test_refuses_nothing_to_do(tmp_path: Path, minutes: float, seeds: int) -> None:
    with pytest.raises(ValueError, match=f"minutes {minutes}, seeds {seeds}"):
        run_demo(tmp_path, minutes=minutes, seeds=seeds)


@pytest.mark.parametrize("changed", [{"minutes": 2.0}, {"seeds": 2}, {"plan": ON_TOWERS}])
def test_refuses_a_folder_of_other_settings_before_anything_is_done(tmp_path: Path, changed: dict[str, Any]) -> None:
    settings = {"minutes": 1.0, "seeds": 1}
    (tmp_path / "demo.json").write_text(json.dumps(settings | {"from_scratch": True, "seconds": 7.5}))
    with pytest.raises(ValueError, match=r"--minutes 1\.0 --seeds 1 --from-scratch; .* or choose another --out"):
        run_demo(tmp_path, **(settings | {"plan": FROM_SCRATCH} | changed))
    assert {path.name for path in tmp_path.iterdir()} == {"demo.json", ".lock"}


def test_refuses_a_folder_in_use(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(FileExistsError, match="another process works in"):
        run_demo(tmp_path)


def test_the_runs_measured_beforehand_are_those_of_the_page_on_bridges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("bridges")
    monkeypatch.setattr(benchmark, "train_all", None)  # all runs are there
    options = ["depth-6", "--work", tmp_path, "--results", ROOT / "docs" / "bridges.json"]
    monkeypatch.setattr(sys, "argv", ["bridges.py", *map(str, options)])
    benchmark.main()
    made = tmp_path / "depth-6" / "comparison.json"
    assert Comparison.of(read_json(DEEP_TOWERS)) == Comparison.of(read_json(made)), f"copy {made} to {DEEP_TOWERS}"
