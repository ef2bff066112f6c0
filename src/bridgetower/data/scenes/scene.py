"""What a generated picture holds, and how it is drawn by lot."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bridgetower.data.scenes.config import LevelName

Relation = Literal["left of", "right of", "above", "below"]

RELATIONS: tuple[Relation, ...] = ("left of", "right of", "above", "below")
RADII = {"large": 0.14, "small": 0.085}  # of the picture's side
CURTAIN_SHARE = 0.4  # of the picture's side

_GAP = 0.02  # between shapes, and to the border
_CLEAR = 0.12  # a relation holds or fails only by more than this
_TRIES = 200  # to place all shapes before fewer are tried


@dataclass(frozen=True, kw_only=True)
class Level:
    """How rich the pictures are.

    Attributes:
        kinds: Shapes that occur.
        colours: Their colours.
        sizes: Their sizes, of `RADII`.
        num_shapes: Fewest and most shapes of a picture.
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
        """Whether a shape is what the description says."""
        return (
            self.kind in (None, shape.kind) and self.colour in (None, shape.colour) and self.size in (None, shape.size)
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
    """One shape of a picture.

    Attributes:
        kind, colour, size: What it is.
        x, y: Its centre from the upper left corner, in sides of the picture.
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
        """Radius of the circle around it, in sides of the picture."""
        return RADII[self.size]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture before it is drawn.

    Attributes:
        shapes: What can be seen.
        background: Colour under them.
        curtain: Side of the picture that is covered, so that nobody can tell what is there; None if all is open.
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
    focus = (
        generator.random()
    )  # share of shapes that take after the nouns: from scenes about them to scenes about others
    shapes = tuple(_shape(generator, level, size, x, y, nouns, focus) for size, x, y in places)
    return Scene(shapes=shapes, background=generator.choice(level.backgrounds), curtain=curtain)


def _shape(
    generator: random.Random, level: Level, size: str, x: float, y: float, nouns: Sequence[Noun], focus: float
) -> Shape:
    kind, colour = generator.choice(level.kinds), generator.choice(level.colours)
    if nouns and generator.random() < focus:
        noun = generator.choice(nouns)
        keep = generator.choice(("both", "both", "kind", "colour"))
        kind = noun.kind if noun.kind and keep != "colour" else kind
        colour = noun.colour if noun.colour and keep != "kind" else colour
    return Shape(kind=kind, colour=colour, size=size, x=x, y=y, turn=generator.uniform(0, 360) if level.turned else 0)


def _places(
    generator: random.Random, level: Level, num_shapes: int, curtain: Relation | None
) -> list[tuple[str, float, float]]:
    """Draws sizes and centres that leave a gap between any two shapes."""
    left, top, right, bottom = _open_part(curtain)
    places: list[tuple[str, float, float]] = []
    for _ in range(_TRIES):
        if len(places) == num_shapes:
            break
        size = generator.choice(level.sizes)
        edge = RADII[size] + _GAP
        x, y = generator.uniform(left + edge, right - edge), generator.uniform(top + edge, bottom - edge)
        if all(math.hypot(x - u, y - v) >= RADII[size] + RADII[other] + _GAP for other, u, v in places):
            places.append((size, x, y))
    return places


def _open_part(curtain: Relation | None) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the part of the picture that is not covered."""
    left = CURTAIN_SHARE if curtain == "left of" else 0.0
    top = CURTAIN_SHARE if curtain == "above" else 0.0
    right = 1 - CURTAIN_SHARE if curtain == "right of" else 1.0
    bottom = 1 - CURTAIN_SHARE if curtain == "below" else 1.0
    return left, top, right, bottom


def curtain_box(curtain: Relation) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the covered part, in sides of the picture."""
    left, top, right, bottom = _open_part(curtain)
    return {
        "left of": (0.0, 0.0, left, 1.0),
        "above": (0.0, 0.0, 1.0, top),
        "right of": (right, 0.0, 1.0, 1.0),
        "below": (0.0, bottom, 1.0, 1.0),
    }[curtain]
