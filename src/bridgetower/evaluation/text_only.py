"""What can be got right without looking at the picture."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence


def majority_answer(answers: Iterable[str]) -> str:
    """Returns the commonest answer, of equally common ones the first in alphabetical order.

    Raises:
        ValueError: There is none.
    """
    counts = Counter(answers)
    if not counts:
        raise ValueError("no answers; expected those of the training set")
    return min(counts, key=lambda answer: (-counts[answer], answer))


def text_only_answers(training: Sequence[tuple[str, str]], texts: Iterable[str]) -> list[str]:
    """Answers each text with what it is answered most in training; no model can do better without the picture.

    That holds where texts come again, as questions made by rules do. A text that training does not have gets the
    commonest answer of all.

    Args:
        training: Text and answer of the training examples.
        texts: To be answered.

    Raises:
        ValueError: There are no training examples.
    """
    told: Mapping[str, list[str]] = defaultdict(list)
    for text, answer in training:
        told[text].append(answer)
    commonest = majority_answer(answer for _, answer in training)
    majority = {text: majority_answer(answers) for text, answers in told.items()}
    return [majority.get(text, commonest) for text in texts]
