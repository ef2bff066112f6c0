"""Scenes for a text and the answer that it shall have, so that the text alone tells nothing of the answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from bridgetower.data.scenes.scene import RELATIONS, Level, Noun, Relation, Scene, draw_lot

Pictures = TypeVar("Pictures", Scene, tuple[Scene, Scene])

_TRIES = 50_000  # scenes drawn for an answer; most take fewer than twenty


@dataclass(frozen=True, kw_only=True)
class Asked(Generic[Pictures]):
    """A question or statement with its exact answer for any picture.

    Attributes:
        text: The words.
        answers: What may be answered; each is drawn equally often.
        nouns: Descriptions in the text.
        answer: The answer for a picture (or pair of pictures); None where the text does not fit the picture.
    """

    text: str
    answers: Sequence[str]
    nouns: Sequence[Noun]
    answer: Callable[[Pictures], str | None]


Maker = Callable[[random.Random, Level], Asked[Pictures]]


def scene_for(asked: Asked[Scene], answer: str, generator: random.Random, level: Level, *, curtains: bool) -> Scene:
    """Draws scenes until one has the answer.

    Args:
        asked: The question or statement.
        answer: What its answer shall be.
        generator: Source of chance.
        level: How rich scenes are.
        curtains: Whether half of the scenes drawn are covered in part.

    Raises:
        RuntimeError: If no scene has the answer.
    """

    def drawn() -> Scene:
        curtain = generator.choice(RELATIONS) if curtains and generator.random() < 0.5 else None
        return _drawn(generator, level, asked.nouns, curtain)

    return _first(asked, answer, drawn)


def scenes_for(
    asked: Asked[tuple[Scene, Scene]], answer: str, generator: random.Random, level: Level
) -> tuple[Scene, Scene]:
    """Draws pairs of scenes until one has the answer; arguments as for `scene_for`."""
    return _first(asked, answer, lambda: (_drawn(generator, level, asked.nouns), _drawn(generator, level, asked.nouns)))


def _drawn(generator: random.Random, level: Level, nouns: Sequence[Noun], curtain: Relation | None = None) -> Scene:
    return draw_lot(generator, level, generator.randint(*level.num_shapes), nouns=nouns, curtain=curtain)


def _first(asked: Asked[Pictures], answer: str, drawn: Callable[[], Pictures]) -> Pictures:
    for _ in range(_TRIES):
        pictures = drawn()
        if asked.answer(pictures) == answer:
            return pictures
    raise RuntimeError(f"no scene in {_TRIES} answers {asked.text!r} with {answer!r}")
