"""Captions, questions and statements against hand-made scenes, and scenes drawn for an answer."""

import random
from dataclasses import replace

import pytest

from bridgetower.data.sets.schema import SNLI_VE
from bridgetower_demo.toysets.scene_drawing import LEVELS, Noun, Scene, Shape
from bridgetower_demo.toysets.scene_texts import TOPICS, Asked, scenes_for

CONTRADICTION, NEUTRAL, ENTAILMENT = SNLI_VE.labels


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
OPEN = Scene(shapes=(shape("circle", "red", 0.2, 0.2), shape("square", "red", 0.8, 0.25)))
COVERED = replace(OPEN, curtain="below")
PAIR = (
    Scene(shapes=(shape("circle", "red"), shape("circle", "blue"))),
    Scene(shapes=(shape("circle", "red"), shape("square", "red"), shape("square", "red"))),
)
ANSWERS = {
    "vqa": {
        "is there a red circle?": ("yes",),
        "is there a blue circle?": ("no",),
        "what colour is the circle?": ("red",),
        "what colour is the triangle?": (None,),
        "how many triangles are there?": ("2",),
        "how many red shapes are there?": ("2",),
        "how many yellow shapes are there?": ("0",),
        "how many green triangles are there?": ("1",),
        "is the red circle left of the blue square?": ("yes",),
        "is the red circle right of the blue square?": ("no",),
        "is the red circle above the blue square?": (None,),
        "is the red triangle below the blue square?": ("yes",),
        "is the red circle left of the yellow square?": (None,),
        "which shape is above the green triangle?": (None,),
        "which shape is left of the green triangle?": ("circle",),
        "which shape is below the green triangle?": ("triangle",),
    },
    "snli-ve": {  # the label where all is open, and with a curtain
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
    },
    "nlvr2": {
        "there is a red circle in both pictures.": ("True",),
        "there is a blue circle in both pictures.": ("False",),
        "exactly one of the pictures has a red circle.": ("False",),
        "exactly one of the pictures has a red square.": ("True",),
        "exactly one of the pictures has a green square.": ("False",),
        "there are more circles in the left picture than in the right one.": ("True",),
        "there are more circles in the right picture than in the left one.": ("False",),
        "there are more red circles in the right picture than in the left one.": ("False",),
        "the two pictures hold three circles in all.": ("True",),
        "the two pictures hold two circles in all.": ("False",),
        "the two pictures hold four red shapes in all.": ("True",),
    },
}
SCENES = {"vqa": [(SCENE,)], "snli-ve": [(OPEN,), (COVERED,)], "nlvr2": [PAIR]}


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_to_hand_made_scenes(kind):
    answers = {}
    for topic, make in TOPICS[kind].items():
        generator = random.Random(topic)
        for _ in range(5000):
            question = make(generator, LEVELS["easy"])
            answers[question.text] = tuple(question.answer(*scenes) for scenes in SCENES[kind])
            assert {*answers[question.text]} <= {None, *question.answers}
    assert {text: answers[text] for text in ANSWERS[kind]} == ANSWERS[kind]


def test_scenes_for_an_answer_have_it():
    noun = Noun(kind="star")
    question = Asked(
        text="?", answers=("0", "3"), nouns=(noun,), answer=lambda scene: str(len(scene.all(noun)))
    )
    for answer in question.answers:
        (scene,) = scenes_for(question, answer, random.Random(0), LEVELS["medium"])
        assert len(scene.all(noun)) == int(answer)
        assert scene.curtain is None
