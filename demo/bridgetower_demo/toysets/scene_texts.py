"""Captions of generated scenes, and questions and statements whose answer is known for any scene."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bridgetower.data.sets.schema import NLVR2, SNLI_VE
from bridgetower_demo.toysets.scene_drawing import (
    RELATIONS,
    Level,
    Noun,
    Relation,
    Scene,
    Shape,
    draw_lot,
    holds,
)

HIGHEST_COUNT = 4

_TRIES = 50_000  # scenes drawn for an answer; most take fewer than twenty
_YES_NO = ("no", "yes")
_CONTRADICTION, _NEUTRAL, _ENTAILMENT = SNLI_VE.labels
_NUMBERS = ("one", "two", "three", "four", "five")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question or statement with its exact answer for any scene, or pair of scenes.

    Attributes:
        text: The words.
        answers: What may be answered; each is drawn equally often.
        nouns: Descriptions in the text.
        answer: The answer for the scene or scenes; None where the text does not fit.
        num_scenes: Number of scenes that it is about.
    """

    text: str
    answers: Sequence[str]
    nouns: Sequence[Noun]
    answer: Callable[..., str | None]
    num_scenes: int = 1


Maker = Callable[[random.Random, Level], Asked]


def scenes_for(
    asked: Asked, answer: str, generator: random.Random, level: Level, *, curtains: bool = False
) -> tuple[Scene, ...]:
    """Draws scenes until they have the answer.

    Args:
        asked: The question or statement.
        answer: What its answer shall be.
        generator: Source of chance.
        level: How rich scenes are.
        curtains: Whether half of the scenes drawn are covered in part.

    Raises:
        RuntimeError: If no scene has the answer.
    """
    for _ in range(_TRIES):
        scenes = tuple(
            _drawn(generator, level, asked.nouns, curtains) for _ in range(asked.num_scenes)
        )
        if asked.answer(*scenes) == answer:
            return scenes
    raise RuntimeError(f"no scene in {_TRIES} answers {asked.text!r} with {answer!r}")


def _drawn(generator: random.Random, level: Level, nouns: Sequence[Noun], curtains: bool) -> Scene:
    curtain: Relation | None = (
        generator.choice(RELATIONS) if curtains and generator.random() < 0.5 else None
    )
    return draw_lot(
        generator, level, generator.randint(*level.num_shapes), nouns=nouns, curtain=curtain
    )


def caption(scene: Scene, level: Level) -> str:
    """Names all shapes from left to right; sizes only where the level has several."""
    names = [
        _noun(shape, level).with_article
        for shape in sorted(scene.shapes, key=lambda shape: shape.x)
    ]
    if len(names) == 1:
        return f"{names[0]}."
    return f"from left to right: {', '.join(names[:-1])} and {names[-1]}."


def _noun(shape: Shape, level: Level) -> Noun:
    return Noun(
        kind=shape.kind, colour=shape.colour, size=shape.size if len(level.sizes) > 1 else None
    )


def _draw_noun(
    generator: random.Random, level: Level, *, kind: bool = True, colour: bool = True
) -> Noun:
    """Draws a description; a size is part of it now and then, where the level has several."""
    size = (
        generator.choice(level.sizes)
        if len(level.sizes) > 1 and generator.random() < 0.25
        else None
    )
    return Noun(
        kind=generator.choice(level.kinds) if kind else None,
        colour=generator.choice(level.colours) if colour else None,
        size=size,
    )


def _draw_partial_noun(generator: random.Random, level: Level) -> Noun:
    """Draws a description by colour or by kind alone, or by both."""
    kind, colour = generator.choice(((True, False), (False, True), (True, True)))
    return _draw_noun(generator, level, kind=kind, colour=colour)


def draw_two_nouns(generator: random.Random, level: Level) -> tuple[Noun, Noun]:
    """Draws two descriptions that no shape fits both of."""
    first = _draw_noun(generator, level)
    while True:
        second = _draw_noun(generator, level)
        if (first.kind, first.colour) != (second.kind, second.colour):
            return first, second


def _question_exists(generator: random.Random, level: Level) -> Asked:
    noun = _draw_noun(generator, level)
    return Asked(
        text=f"is there {noun.with_article}?",
        answers=_YES_NO,
        nouns=(noun,),
        answer=lambda scene: _YES_NO[bool(scene.all(noun))],
    )


def _question_colour(generator: random.Random, level: Level) -> Asked:
    noun = _draw_noun(generator, level, colour=False)

    def answer(scene: Scene) -> str | None:
        shape = scene.only(noun)
        return shape.colour if shape else None

    return Asked(
        text=f"what colour is the {noun}?", answers=level.colours, nouns=(noun,), answer=answer
    )


def _question_count(generator: random.Random, level: Level) -> Asked:
    noun = _draw_partial_noun(generator, level)
    return Asked(
        text=f"how many {noun.plural} are there?",
        answers=tuple(str(number) for number in range(HIGHEST_COUNT + 1)),
        nouns=(noun,),
        answer=lambda scene: str(len(scene.all(noun))),
    )


def _question_relation(generator: random.Random, level: Level) -> Asked:
    return generator.choice((_placed, _where))(generator, level)


def _placed(generator: random.Random, level: Level) -> Asked:
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


def _where(generator: random.Random, level: Level) -> Asked:
    noun = _draw_noun(generator, level)
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
    held = [
        (holds(relation, shape, target), shape.kind)
        for shape in scene.shapes
        if shape is not target
    ]
    beside = [kind for holding, kind in held if holding]
    return (
        beside[0] if len(beside) == 1 and all(holding is not None for holding, _ in held) else None
    )


def _statement_exists(generator: random.Random, level: Level) -> Asked:
    noun = _draw_noun(generator, level)

    def answer(scene: Scene) -> str:
        if scene.all(noun):
            return _ENTAILMENT
        return _NEUTRAL if scene.curtain else _CONTRADICTION

    return Asked(
        text=f"there is {noun.with_article}.", answers=SNLI_VE.labels, nouns=(noun,), answer=answer
    )


def _statement_all(generator: random.Random, level: Level) -> Asked:
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

    return Asked(text=text, answers=SNLI_VE.labels, nouns=(noun,), answer=answer)


def _statement_count(generator: random.Random, level: Level) -> Asked:
    noun = _draw_partial_noun(generator, level)
    number = generator.randint(1, 3)
    verb, name = ("is", str(noun)) if number == 1 else ("are", noun.plural)

    def answer(scene: Scene) -> str:
        seen = len(scene.all(noun))
        if seen > number or (seen < number and not scene.curtain):
            return _CONTRADICTION
        return _NEUTRAL if scene.curtain else _ENTAILMENT

    text = f"there {verb} exactly {('one', 'two', 'three')[number - 1]} {name}."
    return Asked(text=text, answers=SNLI_VE.labels, nouns=(noun,), answer=answer)


def _statement_relation(generator: random.Random, level: Level) -> Asked:
    """Draws one whose "the" refers to a shape that is there: seen once, or else behind the curtain."""
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
        answers=SNLI_VE.labels,
        nouns=(first, second),
        answer=answer,
    )


def _pair_both(generator: random.Random, level: Level) -> Asked:
    noun = _draw_noun(generator, level)
    text = f"there is {noun.with_article} in both pictures."
    return _pair_statement(text, noun, lambda left, right: min(left, right) > 0)


def _pair_one(generator: random.Random, level: Level) -> Asked:
    noun = _draw_noun(generator, level)
    text = f"exactly one of the pictures has {noun.with_article}."
    return _pair_statement(text, noun, lambda left, right: (left > 0) != (right > 0))


def _pair_more(generator: random.Random, level: Level) -> Asked:
    noun = _draw_partial_noun(generator, level)
    if generator.random() < 0.5:
        text = f"there are more {noun.plural} in the left picture than in the right one."
        return _pair_statement(text, noun, lambda left, right: left > right)
    text = f"there are more {noun.plural} in the right picture than in the left one."
    return _pair_statement(text, noun, lambda left, right: right > left)


def _pair_sum(generator: random.Random, level: Level) -> Asked:
    noun = _draw_partial_noun(generator, level)
    number = generator.randint(1, len(_NUMBERS))
    name = str(noun) if number == 1 else noun.plural
    text = f"the two pictures hold {_NUMBERS[number - 1]} {name} in all."
    return _pair_statement(text, noun, lambda left, right: left + right == number)


def _pair_statement(text: str, noun: Noun, true: Callable[[int, int], bool]) -> Asked:
    """A statement that rests on how many shapes of the left and of the right image fit a description."""
    return Asked(
        text=text,
        answers=NLVR2.labels,
        nouns=(noun,),
        answer=lambda left, right: NLVR2.labels[true(len(left.all(noun)), len(right.all(noun)))],
        num_scenes=2,
    )


TOPICS: Mapping[str, Mapping[str, Maker]] = {
    "vqa": {
        "exists": _question_exists,
        "colour": _question_colour,
        "count": _question_count,
        "relation": _question_relation,
    },
    "snli-ve": {
        "exists": _statement_exists,
        "all": _statement_all,
        "count": _statement_count,
        "relation": _statement_relation,
    },
    "nlvr2": {"both": _pair_both, "one": _pair_one, "more": _pair_more, "sum": _pair_sum},
}
"""What makes a question or a statement, by schema and topic."""
