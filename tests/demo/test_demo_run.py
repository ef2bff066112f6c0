"""Settings decide the runs of the demo. The demo itself runs in test_demo_on_towers.py and pages/test_readme.py."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bridgetower.files import locked
from bridgetower.model.presets import meter
from bridgetower_demo import run
from bridgetower_demo.__main__ import main
from bridgetower_demo.folder import trained_model
from bridgetower_demo.plan import FROM_SCRATCH, MINUTES, ON_TOWERS
from bridgetower_demo.recipes import RECIPES
from bridgetower_demo.results import ARMS
from bridgetower_demo.run import answering_config, demo_config, run_demo

OUT = Path("out")
PLANS = (FROM_SCRATCH, ON_TOWERS)


@pytest.mark.parametrize("plan", PLANS)
def test_arms_differ_in_the_model_alone_and_minutes_scale_their_steps(plan):
    for stage in plan.stages:
        ours, theirs = (demo_config(OUT, plan, stage, arm, 3, MINUTES) for arm in ARMS)
        assert theirs.model == meter(ours.model)
        assert theirs == replace(ours, model=theirs.model, recipe=theirs.recipe, init=theirs.init)
        steps = RECIPES[stage.recipes["meter"]].max_steps
        assert steps is not None
        scaled = {
            minutes: demo_config(OUT, plan, stage, "meter", 0, minutes).max_steps
            for minutes in (MINUTES / 2, 1e-6)
        }
        assert theirs.max_steps == steps == 2 * (scaled[MINUTES / 2] or 0)
        assert (scaled[1e-6] or 0) >= 1
    ours, theirs = (answering_config(OUT, plan, arm, 3, MINUTES / 5) for arm in ARMS)
    assert theirs == replace(ours, init=theirs.init, model=theirs.model, recipe=theirs.recipe)
    assert (ours.max_steps, ours.seed) == (plan.questions.steps // 5, 3)


def test_each_stage_starts_from_the_one_before_and_questions_from_the_last_or_from_nothing():
    first, second = (
        demo_config(OUT, ON_TOWERS, stage, "meter", 1, MINUTES) for stage in ON_TOWERS.stages
    )
    assert (first.init, first.vision, first.text) == (None, "out/towers/vision", "out/towers/text")
    assert (second.init, second.vision) == ("out/runs/meter-1-contrastive/last", None)
    assert (first.freeze_towers, second.freeze_towers) == (True, True)
    for arm in ARMS:
        assert answering_config(OUT, ON_TOWERS, arm, 3, 2.0).init == str(trained_model(OUT, arm, 3))
        assert answering_config(OUT, FROM_SCRATCH, arm, 3, 2.0).init is None
    ours, theirs = (answering_config(OUT, FROM_SCRATCH, arm, 3, 2.0).model for arm in ARMS)
    assert (ours.vision.num_layers, theirs) == (6, meter(ours))


@pytest.mark.parametrize(("minutes", "seeds"), [(0, 1), (-1, 1), (1, 0)])
def test_refuses_nothing_to_do(tmp_path, minutes, seeds):
    with pytest.raises(ValueError, match=f"minutes {minutes}, seeds {seeds}"):
        run_demo(tmp_path, minutes=minutes, seeds=seeds)


@pytest.mark.parametrize("changed", [{"minutes": 2.0}, {"seeds": 2}, {"plan": ON_TOWERS}])
def test_refuses_a_folder_of_other_settings_before_anything_is_done(tmp_path, changed):
    settings = {"minutes": 1.0, "seeds": 1}
    (tmp_path / "demo.json").write_text(
        json.dumps(settings | {"from_scratch": True, "seconds": 7.5})
    )
    with pytest.raises(
        ValueError, match=r"--minutes 1\.0 --seeds 1 --from-scratch; .* or choose another --out"
    ):
        run_demo(tmp_path, **(settings | {"plan": FROM_SCRATCH} | changed))
    assert {path.name for path in tmp_path.iterdir()} == {"demo.json", ".lock"}


def test_the_option_compare_adds_the_other_model(tmp_path, monkeypatch):
    calls = []

    def note(out: Path, *, arms: tuple[str, ...], **_: Any) -> None:
        calls.append(arms)
        raise ValueError("enough")

    monkeypatch.setattr(run, "run_demo", note)
    for options in ([], ["--compare"]):
        with pytest.raises(SystemExit):
            main(["--out", str(tmp_path), *options])
    assert calls == [("bridgetower",), ("bridgetower", "meter")]


def test_refuses_a_folder_in_use(tmp_path):
    with locked(tmp_path), pytest.raises(FileExistsError, match="another process works in"):
        run_demo(tmp_path)
