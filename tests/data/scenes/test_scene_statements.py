"""Statements about open and covered scenes against hand-made ones."""

import random
from dataclasses import replace

from bridgetower.data.kinds import LABELS
from bridgetower.data.scenes.scene import LEVELS, Scene, Shape
from bridgetower.data.scenes.statements import TOPICS

CONTRADICTION, NEUTRAL, ENTAILMENT = LABELS["snli-ve"]


def shape(kind, colour, x, y):
    return Shape(kind=kind, colour=colour, size="large", x=x, y=y)


OPEN = Scene(shapes=(shape("circle", "red", 0.2, 0.2), shape("square", "red", 0.8, 0.25)))
COVERED = replace(OPEN, curtain="below")
LABEL = {  # statement: label where all is open, label with a curtain
    "there is a red circle.": (ENTAILMENT, ENTAILMENT),
    "there is a blue circle.": (CONTRADICTION, NEUTRAL),
    "all shapes are red.": (ENTAILMENT, NEUTRAL),
    "all shapes are circles.": (CONTRADICTION, CONTRADICTION),
    "there is exactly one circle.": (ENTAILMENT, NEUTRAL),
    "there is exactly one red shape.": (CONTRADICTION, CONTRADICTION),
    "there are exactly two red shapes.": (ENTAILMENT, NEUTRAL),
    "there are exactly three red shapes.": (CONTRADICTION, NEUTRAL),
    "the red circle is left of the red square.": (ENTAILMENT, ENTAILMENT),
    "the red circle is right of the red square.": (CONTRADICTION, CONTRADICTION),
    "the red circle is above the red square.": (None, None),  # too close to call
    "the red circle is above the blue square.": (None, NEUTRAL),
}


def test_labels_of_a_scene():
    found = {}
    for topic in TOPICS:
        generator = random.Random(topic)
        for _ in range(5000):
            statement = TOPICS[topic](generator, LEVELS["easy"])
            assert statement.answers == LABELS["snli-ve"]
            found[statement.text] = statement.answer(OPEN), statement.answer(COVERED)
    assert {text: found[text] for text in LABEL} == LABEL
