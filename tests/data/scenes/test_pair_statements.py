"""Statements about two scenes against hand-made ones."""

import random

from bridgetower.data.scenes.pair_statements import TOPICS
from bridgetower.data.scenes.scene import LEVELS, Scene, Shape


def shape(kind, colour):
    return Shape(kind=kind, colour=colour, size="large", x=0.5, y=0.5)


PAIR = (
    Scene(shapes=(shape("circle", "red"), shape("circle", "blue"))),
    Scene(shapes=(shape("circle", "red"), shape("square", "red"), shape("square", "red"))),
)
LABEL = {
    "there is a red circle in both pictures.": "True",
    "there is a blue circle in both pictures.": "False",
    "exactly one of the pictures has a red circle.": "False",
    "exactly one of the pictures has a red square.": "True",
    "exactly one of the pictures has a green square.": "False",
    "there are more circles in the left picture than in the right one.": "True",
    "there are more circles in the right picture than in the left one.": "False",
    "there are more red circles in the right picture than in the left one.": "False",
    "the two pictures hold three circles in all.": "True",
    "the two pictures hold two circles in all.": "False",
    "the two pictures hold four red shapes in all.": "True",
}


def test_labels_of_a_pair():
    found = {}
    for topic in TOPICS:
        generator = random.Random(topic)
        for _ in range(5000):
            statement = TOPICS[topic](generator, LEVELS["easy"])
            found[statement.text] = statement.answer(PAIR)
    assert {text: found[text] for text in LABEL} == LABEL
