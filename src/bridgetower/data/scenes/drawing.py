"""Draws scenes with Pillow."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from bridgetower.data.scenes.scene import Scene, Shape, curtain_box

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (245, 205, 30),
    "purple": (130, 60, 180),
    "orange": (245, 130, 20),
    "pink": (245, 140, 190),
    "black": (20, 20, 20),
}
BACKGROUNDS = {"white": (255, 255, 255), "light": (225, 230, 235), "dark": (85, 90, 100)}

_CURTAIN = ((150, 140, 130), (120, 110, 100))  # two greys in stripes
_STRIPES = 12  # over the whole side
_OVERSAMPLING = 4  # Pillow draws hard edges; averaging smooths them

Point = tuple[float, float]


def draw(scene: Scene, side: int) -> Image.Image:
    """Draws a scene as a square picture of `side` pixels."""
    large = side * _OVERSAMPLING
    picture = Image.new("RGB", (large, large), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        _draw_shape(canvas, shape, large, BACKGROUNDS[scene.background])
    if scene.curtain:
        _draw_curtain(canvas, curtain_box(scene.curtain), large)
    return picture.resize((side, side), Image.Resampling.BOX)


def png(scene: Scene, side: int) -> bytes:
    """Draws a scene and returns the content of a PNG file."""
    buffer = io.BytesIO()
    draw(scene, side).save(buffer, format="PNG")
    return buffer.getvalue()


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: Shape, side: int, background: tuple[int, int, int]) -> None:
    colour = COLOURS[shape.colour]
    x, y, radius = shape.x * side, shape.y * side, shape.radius * side
    if shape.kind in ("circle", "ring"):
        canvas.circle((x, y), radius, fill=colour)
        if shape.kind == "ring":
            canvas.circle((x, y), radius * 0.55, fill=background)
        return
    turn = math.radians(shape.turn)
    canvas.polygon([_turned(point, turn, x, y, radius) for point in _outline(shape.kind)], fill=colour)


def _turned(point: Point, turn: float, x: float, y: float, radius: float) -> Point:
    u, v = point
    return (
        x + radius * (u * math.cos(turn) - v * math.sin(turn)),
        y + radius * (u * math.sin(turn) + v * math.cos(turn)),
    )


def _outline(kind: str) -> Sequence[Point]:
    """Corners of a shape in the unit circle, y downwards."""
    match kind:
        case "square":
            return _regular(4, math.pi / 4)
        case "triangle":
            return _regular(3, -math.pi / 2)
        case "star":
            return [
                (reach * math.cos(angle), reach * math.sin(angle))
                for index in range(10)
                for reach, angle in [(1.0 if index % 2 == 0 else 0.42, -math.pi / 2 + index * math.pi / 5)]
            ]
        case "cross":
            arm, reach = 0.3, 0.95
            quarter = [(arm, -reach), (arm, -arm), (reach, -arm)]
            return [point for turn in range(4) for point in _quarters(quarter, turn)]
        case "heart":
            # The usual heart curve, scaled into the unit circle.
            return [
                (
                    math.sin(t) ** 3,
                    -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17,
                )
                for t in (index * math.pi / 20 for index in range(40))
            ]
    raise ValueError(f"no shape called {kind!r}; expected circle, ring, square, triangle, star, cross or heart")


def _regular(corners: int, start: float) -> list[Point]:
    angles = [start + 2 * math.pi * corner / corners for corner in range(corners)]
    return [(math.cos(angle), math.sin(angle)) for angle in angles]


def _quarters(points: Sequence[Point], turn: int) -> list[Point]:
    for _ in range(turn):
        points = [(-v, u) for u, v in points]
    return list(points)


def _draw_curtain(canvas: ImageDraw.ImageDraw, box: tuple[float, float, float, float], side: int) -> None:
    left, top, right, bottom = (round(edge * side) for edge in box)
    width = side / _STRIPES
    for stripe in range(_STRIPES):
        start, end = max(left, round(stripe * width)), min(right, round((stripe + 1) * width))
        if start < end:
            canvas.rectangle((start, top, end - 1, bottom - 1), fill=_CURTAIN[stripe % 2])
