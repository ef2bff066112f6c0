"""Statements about two scenes, true or false, in the manner of NLVR2."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from bridgetower.data.kinds import LABELS
from bridgetower.data.scenes.asked import Asked, Maker
from bridgetower.data.scenes.questions import draw_noun, draw_partial_noun
from bridgetower.data.scenes.scene import Level, Noun, Scene

Pair = tuple[Scene, Scene]

_NUMBERS = ("one", "two", "three", "four", "five")


def _both(generator: random.Random, level: Level) -> Asked[Pair]:
    noun = draw_noun(generator, level)
    text = f"there is {noun.with_article} in both pictures."
    return _asked(text, noun, lambda left, right: min(left, right) > 0)


def _one(generator: random.Random, level: Level) -> Asked[Pair]:
    noun = draw_noun(generator, level)
    text = f"exactly one of the pictures has {noun.with_article}."
    return _asked(text, noun, lambda left, right: (left > 0) != (right > 0))


def _more(generator: random.Random, level: Level) -> Asked[Pair]:
    noun = draw_partial_noun(generator, level)
    if generator.random() < 0.5:
        text = f"there are more {noun.plural} in the left picture than in the right one."
        return _asked(text, noun, lambda left, right: left > right)
    text = f"there are more {noun.plural} in the right picture than in the left one."
    return _asked(text, noun, lambda left, right: right > left)


def _sum(generator: random.Random, level: Level) -> Asked[Pair]:
    noun = draw_partial_noun(generator, level)
    number = generator.randint(1, len(_NUMBERS))
    name = str(noun) if number == 1 else noun.plural
    text = f"the two pictures hold {_NUMBERS[number - 1]} {name} in all."
    return _asked(text, noun, lambda left, right: left + right == number)


def _asked(text: str, noun: Noun, true: Callable[[int, int], bool]) -> Asked[Pair]:
    """A statement that rests on how many shapes of the left and of the right picture fit a description."""
    return Asked(
        text=text,
        answers=LABELS["nlvr2"],
        nouns=(noun,),
        answer=lambda pair: LABELS["nlvr2"][true(len(pair[0].all(noun)), len(pair[1].all(noun)))],
    )


TOPICS: Mapping[str, Maker[Pair]] = {"both": _both, "one": _one, "more": _more, "sum": _sum}
