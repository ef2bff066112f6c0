"""Scenes as pictures."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridgetower_demo.toysets.scene_drawing import (
    BACKGROUNDS,
    COLOURS,
    LEVELS,
    RELATIONS,
    Scene,
    Shape,
    curtain_box,
    draw,
    draw_lot,
    holds,
)

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
                colour = (
                    BACKGROUNDS[scene.background] if shape.kind == "ring" else COLOURS[shape.colour]
                )
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
    x_start, top, right, bottom = (round(edge * SIDE) for edge in curtain_box(curtain))
    covered = np.zeros((SIDE, SIDE), dtype=bool)
    covered[top:bottom, x_start:right] = True
    assert (picture[covered] < 160).all()
    assert (picture[~covered] == 255).all()


levels = st.sampled_from(sorted(LEVELS))
seeds = st.integers(0, 10_000)


def large_shape(kind="circle", colour="red", x=0.5, y=0.5):
    return Shape(kind=kind, colour=colour, size="large", x=x, y=y)


def test_relations():
    beside = {
        "left of": [(0.2, 0.5, True), (0.8, 0.5, False), (0.45, 0.1, None)],
        "right of": [(0.8, 0.5, True)],
    }
    for relation, positions in (
        beside | {"above": [(0.5, 0.2, True)], "below": [(0.5, 0.2, False)]}
    ).items():
        for x, y, expected in positions:
            assert holds(relation, large_shape(x=x, y=y), large_shape()) is expected


class TestDrawLot:
    @given(name=levels, seed=seeds, curtain=st.sampled_from([None, *RELATIONS]))
    def test_shapes_lie_apart_and_in_the_open(self, name, seed, curtain):
        level = LEVELS[name]
        scene = draw_lot(random.Random(seed), level, level.num_shapes[1], curtain=curtain)
        assert scene.shapes
        for shape, other in itertools.combinations(scene.shapes, 2):
            assert math.hypot(shape.x - other.x, shape.y - other.y) > shape.radius + other.radius
        for shape in scene.shapes:
            assert shape.radius <= shape.x <= 1 - shape.radius
            assert shape.radius <= shape.y <= 1 - shape.radius
        if curtain:
            x_start, top, right, bottom = curtain_box(curtain)
            for shape in scene.shapes:
                beside = shape.x + shape.radius < x_start or shape.x - shape.radius > right
                assert beside or shape.y + shape.radius < top or shape.y - shape.radius > bottom
