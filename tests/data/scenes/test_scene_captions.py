"""Captions of scenes."""

from bridgetower.data.scenes.captions import caption
from bridgetower.data.scenes.scene import LEVELS, Scene, Shape


def test_shapes_are_named_from_left_to_right():
    shapes = (
        Shape(kind="star", colour="orange", size="small", x=0.8, y=0.1),
        Shape(kind="circle", colour="red", size="large", x=0.2, y=0.9),
        Shape(kind="square", colour="blue", size="large", x=0.5, y=0.5),
    )
    assert caption(Scene(shapes=shapes), LEVELS["easy"]) == (
        "from left to right: a red circle, a blue square and an orange star."
    )
    assert caption(Scene(shapes=shapes[:2]), LEVELS["medium"]) == (
        "from left to right: a large red circle and a small orange star."
    )


def test_one_shape():
    scene = Scene(shapes=(Shape(kind="circle", colour="red", size="large", x=0.2, y=0.9),))
    assert caption(scene, LEVELS["easy"]) == "a red circle."
