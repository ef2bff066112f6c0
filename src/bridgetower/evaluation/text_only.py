"""What can be got right without looking at the image, and what with it; importable without torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Grounding:
    """Shares of the examples of a topic that are answered right, in [0, 1].

    Attributes:
        number: Of examples.
        model: By the model.
        other_image: By the model, when it is shown the image, or the images, of another example.
        text_only: By the answer that the same words have most often in training.
        majority: By the commonest answer of training to anything.
    """

    number: int
    model: float
    other_image: float
    text_only: float
    majority: float


def majority_answer(answers: Iterable[str]) -> str:
    """Returns the commonest answer, of equally common ones the first in alphabetical order."""
    counts = Counter(answers)
    if not counts:
        raise ValueError("no answers; expected those of the training set")
    return min(counts, key=lambda answer: (-counts[answer], answer))


def text_only_answers(training: Sequence[tuple[str, str]], texts: Iterable[str]) -> list[str]:
    """Answers each text with what it is answered most in training; no model can do better without the image.

    That holds where texts come again, as questions made by rules do. A text that training does not have gets the
    commonest answer of all.

    Args:
        training: Text and answer of the training examples.
        texts: To be answered.
    """
    given: Mapping[str, list[str]] = defaultdict(list)
    for text, answer in training:
        given[text].append(answer)
    commonest = majority_answer(answer for _, answer in training)
    majority = {text: majority_answer(answers) for text, answers in given.items()}
    return [majority.get(text, commonest) for text in texts]
