"""Scenes drawn for an answer."""

import random

import pytest

from bridgetower.data.scenes.asked import Asked, scene_for, scenes_for
from bridgetower.data.scenes.scene import LEVELS, Noun


def test_scene_has_the_answer():
    noun = Noun(kind="star")
    asked = Asked(text="?", answers=("0", "3"), nouns=(noun,), answer=lambda scene: str(len(scene.all(noun))))
    for answer in asked.answers:
        scene = scene_for(asked, answer, random.Random(0), LEVELS["medium"], curtains=False)
        assert len(scene.all(noun)) == int(answer)
        assert scene.curtain is None


def test_half_of_the_scenes_have_curtains():
    asked = Asked(text="?", answers=("yes",), nouns=(), answer=lambda scene: "yes")
    generator = random.Random(0)
    scenes = [scene_for(asked, "yes", generator, LEVELS["easy"], curtains=True) for _ in range(400)]
    assert 160 < sum(scene.curtain is not None for scene in scenes) < 240
    assert len({scene.curtain for scene in scenes}) == 5


def test_pairs_differ():
    asked = Asked(text="?", answers=("True",), nouns=(), answer=lambda pair: "True")
    left, right = scenes_for(asked, "True", random.Random(0), LEVELS["easy"])
    assert left != right


def test_answer_that_no_scene_has_is_an_error(monkeypatch):
    monkeypatch.setattr("bridgetower.data.scenes.asked._TRIES", 5)
    asked = Asked(text="is it so?", answers=("yes",), nouns=(), answer=lambda scene: None)
    with pytest.raises(RuntimeError, match="no scene in 5 answers 'is it so\\?' with 'yes'"):
        scene_for(asked, "yes", random.Random(0), LEVELS["easy"], curtains=False)
