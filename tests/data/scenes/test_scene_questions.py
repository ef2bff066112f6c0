"""Questions against a hand-made scene."""

import random
from collections import Counter

import pytest

from bridgetower.data.scenes.questions import TOPICS, draw_two_nouns
from bridgetower.data.scenes.scene import LEVELS, Scene, Shape


def shape(kind, colour, x=0.5, y=0.5, size="large"):
    return Shape(kind=kind, colour=colour, size=size, x=x, y=y)


SCENE = Scene(
    shapes=(
        shape("circle", "red", 0.2, 0.3),
        shape("square", "blue", 0.8, 0.3),
        shape("triangle", "red", 0.8, 0.8),
        shape("triangle", "green", 0.5, 0.55),
    )
)
ANSWERS = {
    "is there a red circle?": "yes",
    "is there a blue circle?": "no",
    "what colour is the circle?": "red",
    "what colour is the triangle?": None,
    "how many triangles are there?": "2",
    "how many red shapes are there?": "2",
    "how many yellow shapes are there?": "0",
    "how many green triangles are there?": "1",
    "is the red circle left of the blue square?": "yes",
    "is the red circle right of the blue square?": "no",
    "is the red circle above the blue square?": None,
    "is the red triangle below the blue square?": "yes",
    "is the red circle left of the yellow square?": None,
    "which shape is above the green triangle?": None,
    "which shape is left of the green triangle?": "circle",
    "which shape is below the green triangle?": "triangle",
}


def test_answers_of_a_scene():
    found = {}
    for topic in TOPICS:
        generator = random.Random(topic)
        for _ in range(5000):
            question = TOPICS[topic](generator, LEVELS["easy"])
            found[question.text] = question.answer(SCENE)
    assert {text: found[text] for text in ANSWERS} == ANSWERS


@pytest.mark.parametrize("topic", TOPICS)
def test_answers_may_be_given(topic):
    generator = random.Random(0)
    for _ in range(200):
        question = TOPICS[topic](generator, LEVELS["hard"])
        assert question.answer(SCENE) in {None, *question.answers}


def test_sizes_are_named_now_and_then_where_there_are_several():
    generator = random.Random(0)
    texts = Counter("small" in TOPICS["exists"](generator, LEVELS["medium"]).text for _ in range(800))
    assert 60 < texts[True] < 140


def test_two_nouns_never_name_the_same_shape():
    generator = random.Random(0)
    for _ in range(500):
        first, second = draw_two_nouns(generator, LEVELS["medium"])
        assert (first.kind, first.colour) != (second.kind, second.colour)
