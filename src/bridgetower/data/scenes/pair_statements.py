"""Statements about two scenes, true or false, in the manner of NLVR2."""

from __future__ import annotations

import random
from collections.abc import Callable

from bridgetower.data.scenes.asked import Asked
from bridgetower.data.scenes.questions import draw_noun, draw_partial_noun
from bridgetower.data.scenes.scene import Level, Noun, Scene

TOPICS = ("both", "one", "more", "sum")
LABELS = ("False", "True")

Pair = tuple[Scene, Scene]

_NUMBERS = ("one", "two", "three", "four", "five")


def draw_pair_statement(topic: str, generator: random.Random, level: Level) -> Asked[Pair]:
    """Draws a statement of a topic.

    Raises:
        ValueError: If the topic is unknown.
    """
    match topic:
        case "both":
            noun = draw_noun(generator, level)
            return _asked(
                topic, f"there is {noun.with_article} in both pictures.", noun, lambda left, right: min(left, right) > 0
            )
        case "one":
            noun = draw_noun(generator, level)
            return _asked(
                topic,
                f"exactly one of the pictures has {noun.with_article}.",
                noun,
                lambda left, right: (left > 0) != (right > 0),
            )
        case "more":
            return _more(generator, level)
        case "sum":
            return _sum(generator, level)
    raise ValueError(f"no topic {topic!r}; topics are {', '.join(TOPICS)}")


def _more(generator: random.Random, level: Level) -> Asked[Pair]:
    noun = draw_partial_noun(generator, level)
    if generator.random() < 0.5:
        text = f"there are more {noun.plural} in the left picture than in the right one."
        return _asked("more", text, noun, lambda left, right: left > right)
    text = f"there are more {noun.plural} in the right picture than in the left one."
    return _asked("more", text, noun, lambda left, right: right > left)


def _sum(generator: random.Random, level: Level) -> Asked[Pair]:
    noun = draw_partial_noun(generator, level)
    number = generator.randint(1, len(_NUMBERS))
    name = str(noun) if number == 1 else noun.plural
    text = f"the two pictures hold {_NUMBERS[number - 1]} {name} in all."
    return _asked("sum", text, noun, lambda left, right: left + right == number)


def _asked(topic: str, text: str, noun: Noun, true: Callable[[int, int], bool]) -> Asked[Pair]:
    """A statement that rests on how many shapes of the left and of the right picture fit a description."""
    return Asked(
        topic=topic,
        text=text,
        answers=LABELS,
        nouns=(noun,),
        answer=lambda pair: LABELS[true(len(pair[0].all(noun)), len(pair[1].all(noun)))],
    )
