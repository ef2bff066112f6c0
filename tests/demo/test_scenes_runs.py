"""Recipes for generated scenes and flags fit the sets that are prepared, and train."""

from dataclasses import replace
from pathlib import Path

import pytest

from bridgetower.data.answers import read_vocabulary
from bridgetower.tasks.run_config import read_metrics
from bridgetower.training.run import train
from bridgetower_demo.recipes import RECIPES, task_of
from bridgetower_demo.toysets import prepare_toyset
from bridgetower_demo.toysets.scenes import ScenesConfig


@pytest.mark.parametrize("kind", ["vqa", "snli-ve", "nlvr2"])
def test_two_steps(tmp_path: Path, kind: str) -> None:
    data = tmp_path / "data"
    prepare_toyset(
        "scenes", data, ScenesConfig(kind=kind, num_train=16, num_validation=8, num_test=8, side=60), progress=False
    )
    recipe = RECIPES[f"scenes-{kind}"]
    config = replace(
        recipe,
        data=replace(recipe.data, folders=(str(data),)),
        batch_size=8,
        max_steps=2,
        evaluate_every=0,
        device="cpu",
    )
    train(config, tmp_path / "run", task=task_of(config), progress=False)
    (line,) = read_metrics(tmp_path / "run", "validation")
    assert 0 <= line[recipe.select_by] <= 100


def test_answers_about_flags(tmp_path: Path) -> None:
    prepare_toyset("flag-questions", tmp_path, progress=False)
    assert len(read_vocabulary(tmp_path)) == RECIPES["flag-questions"].model.heads.vqa
