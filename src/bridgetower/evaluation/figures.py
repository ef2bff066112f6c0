"""The figures of each benchmark of classes from its predictions."""

from __future__ import annotations

from torch import Tensor

from bridgetower.data.config import GlueName
from bridgetower.data.statements import Statements
from bridgetower.data.vqa import VqaQuestions
from bridgetower.evaluation.class_metrics import (
    accuracy,
    consistency,
    f1,
    matthews_correlation,
    pearson_correlation,
    spearman_correlation,
)
from bridgetower.evaluation.predictions import Predictions
from bridgetower.evaluation.vqa_score import AnsweredQuestion, VqaScores, vqa_scores
from bridgetower.tasks.config import GLUE_FIGURES

_METRICS = {
    metric.__name__: metric
    for metric in (accuracy, f1, matthews_correlation, pearson_correlation, spearman_correlation)
}


def question_scores(questions: VqaQuestions, predictions: Predictions) -> VqaScores:
    """Returns VQA's official scores.

    Raises:
        ValueError: A question has no answers of annotators.
    """
    answered = [
        AnsweredQuestion(
            answers=tuple(entry["answers"]), answer_type=entry["answer_type"], question_type=entry["question_type"]
        )
        for entry in questions
    ]
    return vqa_scores([questions.answers[number] for number in predictions.classes.tolist()], answered)


def question_figures(scores: VqaScores) -> dict[str, float]:
    """Returns `vqa_score`, in percent, and that of each type of answer."""
    by_type = {f"vqa_score_{name.replace('/', '_')}": score for name, score in scores.by_answer_type.items() if name}
    return {"vqa_score": scores.overall, **by_type}


def statement_figures(statements: Statements, predictions: Predictions) -> dict[str, float]:
    """Returns `accuracy` and, of statements with NLVR2's identifiers, `consistency`.

    Raises:
        ValueError: A statement has no label.
    """
    labels = statements.labels()
    figures = {"accuracy": accuracy(predictions.classes, labels)}
    names = [entry["statement_id"].split("-") for entry in statements]
    if all(len(parts) == 4 for parts in names):  # split, set, pair, sentence: a group is a sentence with all its pairs
        groups = [f"{split}-{number}-{sentence}" for split, number, _, sentence in names]
        figures["consistency"] = consistency(predictions.classes, labels, groups)
    return figures


def glue_figures(name: GlueName, predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Returns what GLUE reports of a task.

    Args:
        name: Of the task.
        predicted: A class, or a number, for each row.
        labels: The right ones.
    """
    return {figure: _METRICS[figure](predicted, labels) for figure in GLUE_FIGURES[name]}
