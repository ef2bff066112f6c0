"""Scenes as pictures."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from bridgetower.data.scenes.drawing import BACKGROUNDS, COLOURS, draw, png
from bridgetower.data.scenes.scene import LEVELS, Scene, Shape, curtain_box, draw_lot

SIDE = 120


def pixel(picture, x, y):
    return picture.getpixel((int(x * picture.width), int(y * picture.height)))


def test_every_shape_has_its_colour_at_its_centre():
    generator = random.Random(0)
    for level in LEVELS.values():
        for _ in range(20):
            scene = draw_lot(generator, level, level.num_shapes[1])
            picture = draw(scene, SIDE)
            for shape in scene.shapes:
                colour = BACKGROUNDS[scene.background] if shape.kind == "ring" else COLOURS[shape.colour]
                assert pixel(picture, shape.x, shape.y) == colour


@pytest.mark.parametrize("turn", [0.0, 33.0])
def test_every_kind_stays_within_its_circle_and_looks_its_own_way(turn):
    drawn = {}
    for kind in LEVELS["hard"].kinds:
        shape = Shape(kind=kind, colour="black", size="large", x=0.5, y=0.5, turn=turn)
        black = np.asarray(draw(Scene(shapes=(shape,)), SIDE).convert("L")) < 128
        rows, columns = np.nonzero(black)
        distance = np.hypot(rows + 0.5 - SIDE / 2, columns + 0.5 - SIDE / 2).max()
        assert 0.7 * shape.radius * SIDE < distance < shape.radius * SIDE + 1
        drawn[kind] = black
    kinds = sorted(drawn)
    for index, kind in enumerate(kinds):
        for other in kinds[index + 1 :]:
            differing = (drawn[kind] ^ drawn[other]).sum()
            assert differing > 0.1 * drawn[kind].sum(), (kind, other)


@pytest.mark.parametrize("curtain", ["left of", "right of", "above", "below"])
def test_curtain_covers_its_side(curtain):
    picture = np.asarray(draw(Scene(shapes=(), curtain=curtain), SIDE))
    left, top, right, bottom = (round(edge * SIDE) for edge in curtain_box(curtain))
    covered = np.zeros((SIDE, SIDE), dtype=bool)
    covered[top:bottom, left:right] = True
    assert (picture[covered] < 160).all()
    assert (picture[~covered] == 255).all()


def test_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match=r"no shape called 'cube'; expected circle"):
        draw(Scene(shapes=(Shape(kind="cube", colour="red", size="large", x=0.5, y=0.5),)), SIDE)


def test_png_is_the_same_picture():
    scene = draw_lot(random.Random(3), LEVELS["hard"], 5)
    assert Image.open(io.BytesIO(png(scene, 60))).tobytes() == draw(scene, 60).tobytes()
