"""Statements about a scene that is covered in part: it entails them, contradicts them, or leaves them open.

What a curtain covers may hold anything.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from bridgetower.data.kinds import LABELS
from bridgetower.data.scenes.asked import Asked, Maker
from bridgetower.data.scenes.questions import draw_noun, draw_partial_noun, draw_two_nouns
from bridgetower.data.scenes.scene import RELATIONS, Level, Noun, Scene, holds

_CONTRADICTION, _NEUTRAL, _ENTAILMENT = LABELS["snli-ve"]


def _exists(generator: random.Random, level: Level) -> Asked[Scene]:
    noun = draw_noun(generator, level)

    def answer(scene: Scene) -> str:
        if scene.all(noun):
            return _ENTAILMENT
        return _NEUTRAL if scene.curtain else _CONTRADICTION

    return Asked(text=f"there is {noun.with_article}.", answers=LABELS["snli-ve"], nouns=(noun,), answer=answer)


def _all(generator: random.Random, level: Level) -> Asked[Scene]:
    if generator.random() < 0.5:
        noun = Noun(colour=generator.choice(level.colours))
        text = f"all shapes are {noun.colour}."
    else:
        noun = Noun(kind=generator.choice(level.kinds))
        text = f"all shapes are {noun.plural}."

    def answer(scene: Scene) -> str:
        if len(scene.all(noun)) < len(scene.shapes):
            return _CONTRADICTION
        return _NEUTRAL if scene.curtain else _ENTAILMENT

    return Asked(text=text, answers=LABELS["snli-ve"], nouns=(noun,), answer=answer)


def _count(generator: random.Random, level: Level) -> Asked[Scene]:
    noun = draw_partial_noun(generator, level)
    number = generator.randint(1, 3)
    verb, name = ("is", str(noun)) if number == 1 else ("are", noun.plural)

    def answer(scene: Scene) -> str:
        seen = len(scene.all(noun))
        if seen > number or (seen < number and not scene.curtain):
            return _CONTRADICTION
        return _NEUTRAL if scene.curtain else _ENTAILMENT

    text = f"there {verb} exactly {('one', 'two', 'three')[number - 1]} {name}."
    return Asked(text=text, answers=LABELS["snli-ve"], nouns=(noun,), answer=answer)


def _relation(generator: random.Random, level: Level) -> Asked[Scene]:
    """Draws one whose "the" speaks of a shape that is there: seen once, or else behind the curtain."""
    first, second = draw_two_nouns(generator, level)
    relation = generator.choice(RELATIONS)

    def answer(scene: Scene) -> str | None:
        if len(scene.all(first)) > 1 or len(scene.all(second)) > 1:
            return None
        one, other = scene.only(first), scene.only(second)
        if one is None or other is None:
            return _NEUTRAL if scene.curtain else None
        held = holds(relation, one, other)
        return None if held is None else (_ENTAILMENT if held else _CONTRADICTION)

    return Asked(
        text=f"the {first} is {relation} the {second}.",
        answers=LABELS["snli-ve"],
        nouns=(first, second),
        answer=answer,
    )


TOPICS: Mapping[str, Maker[Scene]] = {"exists": _exists, "all": _all, "count": _count, "relation": _relation}
