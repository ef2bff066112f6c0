"""VQA's official score: how many annotators gave the predicted answer, overall and by type of question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bridgetower.data.answers import FEW_ANNOTATORS, normalise_answer


@dataclass(frozen=True, kw_only=True)
class VqaScores:
    """Mean scores from 0 to 1, to four decimals: the two that the official evaluation gives in percent.

    Attributes:
        overall: Of all questions.
        by_answer_type, by_question_type: Of the questions of each named type, in alphabetical order.
    """

    overall: float
    by_answer_type: dict[str, float]
    by_question_type: dict[str, float]


def vqa_scores(predictions: Sequence[str], questions: Sequence[Mapping[str, Any]]) -> VqaScores:
    """Returns the scores of all predictions for entries of a VQA set (GT-Vision-Lab/VQA, `vqaEval.py`)."""
    if not questions or len(predictions) != len(questions):
        raise ValueError(
            f"{len(predictions)} predictions for {len(questions)} questions; expected one for each, at least one"
        )
    scores = [vqa_score(given, question["answers"]) for given, question in zip(predictions, questions, strict=True)]
    return VqaScores(
        overall=_mean(scores),
        by_answer_type=_by_type(scores, [question.get("answer_type", "") for question in questions]),
        by_question_type=_by_type(scores, [question.get("question_type", "") for question in questions]),
    )


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
    """Returns the score of one prediction, from 0 to 1.

    It is the mean, over all ways to leave one annotator out, of min(n / 3, 1), n others having given the prediction.
    Where annotators differ, answers and prediction are compared in their normal form; where all are the same, as they
    are. Fewer than four annotators could never give 1 in this way: with them it is the share, in normal form, that gave
    the prediction; with one, whether it is right.
    """
    if not answers:
        raise ValueError("a question has no answers; expected those of the annotators")
    given, predicted = [_on_one_line(answer) for answer in answers], _on_one_line(prediction)
    few = len(given) < FEW_ANNOTATORS
    if few or len(set(given)) > 1:
        given, predicted = [normalise_answer(answer) for answer in given], normalise_answer(predicted)
    same = given.count(predicted)
    if few:
        return same / len(given)
    others = [same - 1] * same + [same] * (len(given) - same)
    return sum(min(count / 3, 1.0) for count in others) / len(given)


def _on_one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _by_type(scores: Sequence[float], types: Sequence[str]) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for score, name in zip(scores, types, strict=True):
        groups[name].append(score)
    return {name: _mean(groups[name]) for name in sorted(groups) if name}


def _mean(scores: Sequence[float]) -> float:
    return round(sum(scores) / len(scores), 4)
