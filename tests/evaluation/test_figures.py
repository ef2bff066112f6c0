"""Figures of the benchmarks from predictions: those of the metrics on the same annotations."""

from pathlib import Path
from typing import Any

import pytest
import torch

import asked
from bridgetower.data.config import DataConfig
from bridgetower.data.pictures import Pictures
from bridgetower.data.schema import SCHEMAS
from bridgetower.data.statements import Statements
from bridgetower.data.vqa import VqaQuestions
from bridgetower.evaluation.figures import question_figures, question_scores, statement_figures
from bridgetower.evaluation.predictions import Predictions
from bridgetower.evaluation.vqa_score import vqa_score
from bridgetower.processor import Processor


@pytest.fixture
def pictures(tmp_path: Path, tiny_processor: Processor) -> Any:
    def make(kind: Any, split: str = "validation") -> Pictures:
        asked.write_set(tmp_path / kind, kind)
        return Pictures(DataConfig(folders=(str(tmp_path / kind),)), split, tiny_processor, schema=SCHEMAS[kind])

    return make


def predictions(classes: list[int]) -> Predictions:
    return Predictions(classes=torch.tensor(classes), probabilities=torch.ones(len(classes)))


def test_questions(pictures: Any) -> None:
    questions = VqaQuestions(pictures("vqa"), asked.ANSWERS)
    classes = [number % len(asked.ANSWERS) for number in range(3, 13)]
    entries = list(questions)
    scores = [vqa_score(asked.ANSWERS[n], entry["answers"]) for n, entry in zip(classes, entries, strict=True)]
    found = question_scores(questions, predictions(classes))
    figures = question_figures(found)
    assert figures["vqa_score"] == pytest.approx(100 * sum(scores) / 10, abs=0.005)
    assert figures["vqa_score_other"] == pytest.approx(100 * sum(scores[::2]) / 5, abs=0.005)
    assert figures["vqa_score_yes_no"] == pytest.approx(100 * sum(scores[1::2]) / 5, abs=0.005)
    assert 0 < figures["vqa_score"] < 100
    assert found.by_question_type.keys() == {"is this", "what colour is"}


def test_questions_without_answers(pictures: Any) -> None:
    questions = VqaQuestions(pictures("vqa", "test"), asked.ANSWERS)
    with pytest.raises(ValueError, match="0 predictions for 0 questions; expected one for each, at least one"):
        question_scores(questions, predictions([0] * 6))


def test_statements_about_one_picture(pictures: Any) -> None:
    statements = Statements(pictures("snli-ve"))
    labels = statements.labels().tolist()
    assert statement_figures(statements, predictions(labels)) == {"accuracy": 1.0}
    wrong = [(label + 1) % 3 if row == 2 else label for row, label in enumerate(labels)]
    assert statement_figures(statements, predictions(wrong)) == {"accuracy": pytest.approx(1 - 1 / len(labels))}


def test_consistency_counts_a_sentence_with_all_its_pairs(pictures: Any) -> None:
    statements = Statements(pictures("nlvr2"))
    labels = statements.labels().tolist()  # of five pairs: two sentences with two pairs, one with one
    wrong = [1 - label if row == 2 else label for row, label in enumerate(labels)]
    assert statement_figures(statements, predictions(wrong)) == {
        "accuracy": pytest.approx(0.8),
        "consistency": pytest.approx(2 / 3),
    }
