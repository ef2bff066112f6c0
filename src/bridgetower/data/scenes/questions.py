"""Questions about a scene: what is there, of which colour, how many, and where."""

from __future__ import annotations

import random
from collections.abc import Mapping

from bridgetower.data.scenes.asked import Asked, Maker
from bridgetower.data.scenes.scene import RELATIONS, Level, Noun, Relation, Scene, holds

_YES_NO = ("no", "yes")
HIGHEST_COUNT = 4


def draw_noun(generator: random.Random, level: Level, *, kind: bool = True, colour: bool = True) -> Noun:
    """Draws a description; a size is part of it now and then, where the level has several."""
    size = generator.choice(level.sizes) if len(level.sizes) > 1 and generator.random() < 0.25 else None
    return Noun(
        kind=generator.choice(level.kinds) if kind else None,
        colour=generator.choice(level.colours) if colour else None,
        size=size,
    )


def draw_partial_noun(generator: random.Random, level: Level) -> Noun:
    """Draws a description by colour or by kind alone, or by both."""
    kind, colour = generator.choice(((True, False), (False, True), (True, True)))
    return draw_noun(generator, level, kind=kind, colour=colour)


def draw_two_nouns(generator: random.Random, level: Level) -> tuple[Noun, Noun]:
    """Draws two descriptions that no shape fits both of."""
    first = draw_noun(generator, level)
    while True:
        second = draw_noun(generator, level)
        if (first.kind, first.colour) != (second.kind, second.colour):
            return first, second


def _exists(generator: random.Random, level: Level) -> Asked[Scene]:
    noun = draw_noun(generator, level)
    return Asked(
        text=f"is there {noun.with_article}?",
        answers=_YES_NO,
        nouns=(noun,),
        answer=lambda scene: _YES_NO[bool(scene.all(noun))],
    )


def _colour(generator: random.Random, level: Level) -> Asked[Scene]:
    noun = draw_noun(generator, level, colour=False)

    def answer(scene: Scene) -> str | None:
        shape = scene.only(noun)
        return shape.colour if shape else None

    return Asked(text=f"what colour is the {noun}?", answers=level.colours, nouns=(noun,), answer=answer)


def _count(generator: random.Random, level: Level) -> Asked[Scene]:
    noun = draw_partial_noun(generator, level)
    return Asked(
        text=f"how many {noun.plural} are there?",
        answers=tuple(str(number) for number in range(HIGHEST_COUNT + 1)),
        nouns=(noun,),
        answer=lambda scene: str(len(scene.all(noun))),
    )


def _relation(generator: random.Random, level: Level) -> Asked[Scene]:
    return generator.choice((_placed, _where))(generator, level)


def _placed(generator: random.Random, level: Level) -> Asked[Scene]:
    first, second = draw_two_nouns(generator, level)
    relation = generator.choice(RELATIONS)

    def answer(scene: Scene) -> str | None:
        one, other = scene.only(first), scene.only(second)
        held = holds(relation, one, other) if one and other else None
        return None if held is None else _YES_NO[held]

    return Asked(
        text=f"is the {first} {relation} the {second}?",
        answers=_YES_NO,
        nouns=(first, second),
        answer=answer,
    )


def _where(generator: random.Random, level: Level) -> Asked[Scene]:
    noun = draw_noun(generator, level)
    relation = generator.choice(RELATIONS)

    def answer(scene: Scene) -> str | None:
        return _kind_beside(scene, noun, relation)

    return Asked(
        text=f"which shape is {relation} the {noun}?",
        answers=level.kinds,
        nouns=(noun,),
        answer=answer,
    )


def _kind_beside(scene: Scene, noun: Noun, relation: Relation) -> str | None:
    """Returns the kind of the one shape that stands in the relation; None if that is not one, or too close to call."""
    target = scene.only(noun)
    if target is None:
        return None
    held = [(holds(relation, shape, target), shape.kind) for shape in scene.shapes if shape is not target]
    beside = [kind for holding, kind in held if holding]
    return beside[0] if len(beside) == 1 and all(holding is not None for holding, _ in held) else None


TOPICS: Mapping[str, Maker[Scene]] = {"exists": _exists, "colour": _colour, "count": _count, "relation": _relation}
