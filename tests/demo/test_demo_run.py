"""What decides the demo's runs; the demo itself runs in end_to_end/test_readme.py."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bridgetower.demo.folder import trained_model
from bridgetower.demo.run import MINUTES, answering_config, demo_config, run_demo
from bridgetower.files import locked
from bridgetower.model.presets import meter
from bridgetower.tasks.table import RECIPES

OUT = Path("out")


def test_arms_differ_in_the_model_alone():
    ours, theirs = (demo_config(OUT, arm, 3, MINUTES) for arm in ("bridgetower", "meter"))
    assert theirs.model == meter(ours.model)
    assert theirs == replace(ours, model=theirs.model, recipe=theirs.recipe)


def test_minutes_scale_the_steps():
    recipe = RECIPES["pretrain-nano"]
    assert demo_config(OUT, "meter", 0, MINUTES).max_steps == recipe.max_steps
    assert demo_config(OUT, "meter", 0, MINUTES / 2).max_steps == recipe.max_steps // 2
    assert demo_config(OUT, "meter", 0, 1e-6).max_steps >= 1


def test_questions_are_learnt_from_the_pretrained_model_of_each_arm():
    ours, theirs = (answering_config(OUT, arm, 3, 60) for arm in ("bridgetower", "meter"))
    assert theirs == replace(ours, init=theirs.init)
    assert ours.init == str(trained_model(OUT, "bridgetower", 3)) != theirs.init
    assert (ours.max_steps, ours.seed) == (60, 3)


@pytest.mark.parametrize(("minutes", "seeds"), [(0, 1), (-1, 1), (1, 0)])
def test_refuses_nothing_to_do(tmp_path, minutes, seeds):
    with pytest.raises(ValueError, match=f"minutes {minutes}, seeds {seeds}"):
        run_demo(tmp_path, minutes=minutes, seeds=seeds)


@pytest.mark.parametrize("changed", [{"minutes": 2.0}, {"seeds": 2}])
def test_refuses_a_folder_of_other_settings_before_anything_is_done(tmp_path, changed):
    (tmp_path / "demo.json").write_text(json.dumps({"minutes": 1.0, "seeds": 1, "seconds": 7.5}))
    with pytest.raises(ValueError, match=r"--minutes 1\.0 --seeds 1; .* or choose another --out"):
        run_demo(tmp_path, **({"minutes": 1.0, "seeds": 1} | changed))
    assert {path.name for path in tmp_path.iterdir()} == {"demo.json", ".lock"}


def test_refuses_a_folder_in_use(tmp_path):
    with locked(tmp_path), pytest.raises(FileExistsError, match="another process works in"):
        run_demo(tmp_path)
