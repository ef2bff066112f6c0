"""The figures of each benchmark of classes from its predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from bridgetower.data.config import GlueName
from bridgetower.data.schema import NLVR2, nlvr2_sentence
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
from bridgetower.objectives.config import GLUE_FIGURES

_METRICS = {
    metric.__name__: metric
    for metric in (accuracy, f1, matthews_correlation, pearson_correlation, spearman_correlation)
}


def question_scores(questions: VqaQuestions, predictions: Predictions) -> VqaScores:
    """Returns VQA's official scores of the questions that have answers of annotators.

    Raises:
        ValueError: No question has.
    """
    answered = {
        number: AnsweredQuestion(
            answers=tuple(entry["answers"]), answer_type=entry["answer_type"], question_type=entry["question_type"]
        )
        for number, entry in enumerate(questions)
        if entry["answers"]
    }
    said = [questions.answers[number] for number in predictions.classes[list(answered)].tolist()]
    return vqa_scores(said, list(answered.values()))


def question_figures(scores: VqaScores) -> dict[str, float]:
    """Returns `vqa_score`, in percent, and that of each type of answer."""
    by_type = {f"vqa_score_{name.replace('/', '_')}": score for name, score in scores.by_answer_type.items() if name}
    return {"vqa_score": scores.overall, **by_type}


def statement_figures(statements: Statements, predictions: Predictions) -> dict[str, float]:
    """Returns `accuracy` and, where NLVR2's identifiers tell the sentences, `consistency` of the labelled statements.

    Raises:
        ValueError: No statement has a label.
    """
    labelled = {number: entry for number, entry in enumerate(statements) if entry["label"]}
    labels = torch.tensor([statements.label(entry) for entry in labelled.values()])
    predicted = predictions.classes[list(labelled)]
    figures = {"accuracy": accuracy(predicted, labels)}
    if statements.schema is NLVR2:
        groups = [nlvr2_sentence(entry["statement_id"]) for entry in labelled.values()]
        known = [group for group in groups if group is not None]
        if len(known) == len(groups):
            figures["consistency"] = consistency(predicted, labels, known)
    return figures


def glue_figures(name: GlueName, predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Returns what GLUE reports of a task.

    Args:
        name: Of the task.
        predicted: A class, or a number, for each row.
        labels: The right ones.
    """
    return {figure: _METRICS[figure](predicted, labels) for figure in GLUE_FIGURES[name]}
