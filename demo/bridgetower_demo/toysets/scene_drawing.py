"""Scenes of coloured shapes: what one holds, how it is drawn by lot, and its image."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw

LevelName = Literal["easy", "medium", "hard"]
Relation = Literal["left of", "right of", "above", "below"]

RELATIONS: tuple[Relation, ...] = ("left of", "right of", "above", "below")
RADII = {"large": 0.14, "small": 0.085}  # of the image's side
CURTAIN_SHARE = 0.4  # of the image's side

_GAP = 0.02  # between shapes, and to the border
_CLEAR = 0.12  # a relation holds or fails only by more than this
_PLACES = 200  # tries to place all shapes before fewer are tried

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


@dataclass(frozen=True, kw_only=True)
class Level:
    """How rich the images are.

    Attributes:
        kinds: Shapes that occur.
        colours: Their colours.
        sizes: Their sizes, of `RADII`.
        num_shapes: Fewest and most shapes of an image.
        turned: Whether shapes are turned.
        backgrounds: Colours under the shapes.
    """

    kinds: tuple[str, ...]
    colours: tuple[str, ...]
    sizes: tuple[str, ...]
    num_shapes: tuple[int, int]
    turned: bool
    backgrounds: tuple[str, ...]


LEVELS: dict[LevelName, Level] = {
    "easy": Level(
        kinds=("circle", "square", "triangle"),
        colours=("red", "green", "blue", "yellow"),
        sizes=("large",),
        num_shapes=(1, 4),
        turned=False,
        backgrounds=("white",),
    ),
    "medium": Level(
        kinds=("circle", "square", "triangle", "cross", "star"),
        colours=("red", "green", "blue", "yellow", "purple", "orange"),
        sizes=("small", "large"),
        num_shapes=(2, 6),
        turned=False,
        backgrounds=("white", "light"),
    ),
    "hard": Level(
        kinds=("circle", "square", "triangle", "cross", "star", "ring", "heart"),
        colours=("red", "green", "blue", "yellow", "purple", "orange", "pink", "black"),
        sizes=("small", "large"),
        num_shapes=(3, 8),
        turned=True,
        backgrounds=("white", "light", "dark"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Noun:
    """A description that a shape fits or not; None leaves the property open."""

    kind: str | None = None
    colour: str | None = None
    size: str | None = None

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.colour, self.kind or "shape") if word)

    def fits(self, shape: Shape) -> bool:
        """Whether a shape fits the description."""
        return (
            self.kind in (None, shape.kind)
            and self.colour in (None, shape.colour)
            and self.size in (None, shape.size)
        )

    @property
    def with_article(self) -> str:
        """The description of any one."""
        text = str(self)
        return f"an {text}" if text.startswith("orange") else f"a {text}"

    @property
    def plural(self) -> str:
        """The description of several."""
        text = str(self)
        return f"{text}es" if text.endswith("cross") else f"{text}s"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One shape of an image.

    Attributes:
        kind, colour, size: What it is.
        x, y: Its centre from the upper left corner, in sides of the image.
        turn: Degrees by which it is turned.
    """

    kind: str
    colour: str
    size: str
    x: float
    y: float
    turn: float = 0.0

    @property
    def radius(self) -> float:
        """Radius of the circle around it, in sides of the image."""
        return RADII[self.size]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """An image before it is drawn.

    Attributes:
        shapes: What can be seen.
        background: Colour under them.
        curtain: Side of the image that is covered, so that what is there is unknown; None if all is open.
    """

    shapes: tuple[Shape, ...]
    background: str = "white"
    curtain: Relation | None = None

    def all(self, noun: Noun) -> list[Shape]:
        """Returns the shapes that fit a description."""
        return [shape for shape in self.shapes if noun.fits(shape)]

    def only(self, noun: Noun) -> Shape | None:
        """Returns the one shape that fits a description; None if none or several do."""
        found = self.all(noun)
        return found[0] if len(found) == 1 else None


def holds(relation: Relation, first: Shape, second: Shape) -> bool | None:
    """Whether `first` is, say, left of `second`; None if that is too close to call."""
    across = second.x - first.x if relation in ("left of", "right of") else second.y - first.y
    signed = across if relation in ("left of", "above") else -across
    return None if abs(signed) < _CLEAR else signed > 0


def draw_lot(
    generator: random.Random,
    level: Level,
    num_shapes: int,
    *,
    nouns: Sequence[Noun] = (),
    curtain: Relation | None = None,
) -> Scene:
    """Draws a scene by lot.

    Args:
        generator: Source of chance.
        level: How rich it is.
        num_shapes: Shapes to place; fewer where there is no room.
        nouns: Descriptions that shapes shall fit, in part or in whole, more often than by chance.
        curtain: Side to keep free.
    """
    places = _places(generator, level, num_shapes, curtain)
    # Share of shapes that take after the nouns: from scenes about them to scenes about others.
    focus = generator.random()
    shapes = tuple(_shape(generator, level, size, x, y, nouns, focus) for size, x, y in places)
    return Scene(shapes=shapes, background=generator.choice(level.backgrounds), curtain=curtain)


def _shape(
    generator: random.Random,
    level: Level,
    size: str,
    x: float,
    y: float,
    nouns: Sequence[Noun],
    focus: float,
) -> Shape:
    kind, colour = generator.choice(level.kinds), generator.choice(level.colours)
    if nouns and generator.random() < focus:
        noun = generator.choice(nouns)
        keep = generator.choice(("both", "both", "kind", "colour"))
        kind = noun.kind if noun.kind and keep != "colour" else kind
        colour = noun.colour if noun.colour and keep != "kind" else colour
    return Shape(
        kind=kind,
        colour=colour,
        size=size,
        x=x,
        y=y,
        turn=generator.uniform(0, 360) if level.turned else 0,
    )


def _places(
    generator: random.Random, level: Level, num_shapes: int, curtain: Relation | None
) -> list[tuple[str, float, float]]:
    """Draws sizes and centres that leave a gap between any two shapes."""
    left, top, right, bottom = _open_part(curtain)
    places: list[tuple[str, float, float]] = []
    for _ in range(_PLACES):
        if len(places) == num_shapes:
            break
        size = generator.choice(level.sizes)
        edge = RADII[size] + _GAP
        x, y = (
            generator.uniform(left + edge, right - edge),
            generator.uniform(top + edge, bottom - edge),
        )
        if all(
            math.hypot(x - u, y - v) >= RADII[size] + RADII[other] + _GAP for other, u, v in places
        ):
            places.append((size, x, y))
    return places


def _open_part(curtain: Relation | None) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the part of the image that is not covered."""
    left = CURTAIN_SHARE if curtain == "left of" else 0.0
    top = CURTAIN_SHARE if curtain == "above" else 0.0
    right = 1 - CURTAIN_SHARE if curtain == "right of" else 1.0
    bottom = 1 - CURTAIN_SHARE if curtain == "below" else 1.0
    return left, top, right, bottom


def curtain_box(curtain: Relation) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the covered part, in sides of the image."""
    left, top, right, bottom = _open_part(curtain)
    return {
        "left of": (0.0, 0.0, left, 1.0),
        "above": (0.0, 0.0, 1.0, top),
        "right of": (right, 0.0, 1.0, 1.0),
        "below": (0.0, bottom, 1.0, 1.0),
    }[curtain]


def draw(scene: Scene, side: int) -> Image.Image:
    """Draws a scene as a square image of `side` pixels."""
    large = side * _OVERSAMPLING
    image = Image.new("RGB", (large, large), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(image)
    for shape in scene.shapes:
        _draw_shape(canvas, shape, large, BACKGROUNDS[scene.background])
    if scene.curtain:
        _draw_curtain(canvas, curtain_box(scene.curtain), large)
    return image.resize((side, side), Image.Resampling.BOX)


def png(scene: Scene, side: int) -> bytes:
    """Draws a scene and returns the content of a PNG file."""
    buffer = io.BytesIO()
    draw(scene, side).save(buffer, format="PNG")
    return buffer.getvalue()


def _draw_shape(
    canvas: ImageDraw.ImageDraw, shape: Shape, side: int, background: tuple[int, int, int]
) -> None:
    colour = COLOURS[shape.colour]
    x, y, radius = shape.x * side, shape.y * side, shape.radius * side
    if shape.kind in ("circle", "ring"):
        canvas.circle((x, y), radius, fill=colour)
        if shape.kind == "ring":
            canvas.circle((x, y), radius * 0.55, fill=background)
        return
    turn = math.radians(shape.turn)
    canvas.polygon(
        [_turned(point, turn, x, y, radius) for point in _outline(shape.kind)], fill=colour
    )


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
                for reach, angle in [
                    (1.0 if index % 2 == 0 else 0.42, -math.pi / 2 + index * math.pi / 5)
                ]
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
                    -(
                        13 * math.cos(t)
                        - 5 * math.cos(2 * t)
                        - 2 * math.cos(3 * t)
                        - math.cos(4 * t)
                    )
                    / 17,
                )
                for t in (index * math.pi / 20 for index in range(40))
            ]
    raise ValueError(
        f"no shape called {kind!r}; expected circle, ring, square, triangle, star, cross or heart"
    )


def _regular(corners: int, start: float) -> list[Point]:
    angles = [start + 2 * math.pi * corner / corners for corner in range(corners)]
    return [(math.cos(angle), math.sin(angle)) for angle in angles]


def _quarters(points: Sequence[Point], turn: int) -> list[Point]:
    for _ in range(turn):
        points = [(-v, u) for u, v in points]
    return list(points)


def _draw_curtain(
    canvas: ImageDraw.ImageDraw, box: tuple[float, float, float, float], side: int
) -> None:
    left, top, right, bottom = (round(edge * side) for edge in box)
    width = side / _STRIPES
    for stripe in range(_STRIPES):
        start, end = max(left, round(stripe * width)), min(right, round((stripe + 1) * width))
        if start < end:
            canvas.rectangle((start, top, end - 1, bottom - 1), fill=_CURTAIN[stripe % 2])
