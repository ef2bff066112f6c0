"""Metrics of questions and statements from predictions: those of the metrics on the same annotations."""

from pathlib import Path
from typing import Any

import pytest
import torch

import asked
from bridgetower.data.examples import EntryDataset
from bridgetower.evaluation.predictions import Predictions
from bridgetower.evaluation.vqa_score import vqa_score
from bridgetower.processor import Processor
from bridgetower.tasks.statements import statement_metrics
from bridgetower.tasks.vqa import question_scores, vqa_metrics


@pytest.fixture
def load(tmp_path: Path, tiny_processor: Processor) -> Any:
    def make(kind: str, split: str = "validation") -> EntryDataset:
        return asked.examples(asked.write_set(tmp_path / kind, kind), kind, tiny_processor, split)

    return make


def predictions(classes: list[int]) -> Predictions:
    return Predictions(classes=torch.tensor(classes), probabilities=torch.ones(len(classes)))


def classes(statements: EntryDataset) -> list[int]:
    return [int(statements.encode.tensor(entry)) for entry in statements]


def test_questions(load: Any) -> None:
    questions = load("vqa")
    given = [number % len(asked.ANSWERS) for number in range(3, 13)]
    entries = list(questions)
    scores = [vqa_score(asked.ANSWERS[n], entry["answers"]) for n, entry in zip(given, entries, strict=True)]
    found = question_scores(questions, predictions(given), asked.ANSWERS)
    metrics = vqa_metrics(found)
    assert metrics["vqa_score"] == pytest.approx(sum(scores) / 10, abs=5e-5)
    assert metrics["vqa_score_other"] == pytest.approx(sum(scores[::2]) / 5, abs=5e-5)
    assert metrics["vqa_score_yes_no"] == pytest.approx(sum(scores[1::2]) / 5, abs=5e-5)
    assert 0 < metrics["vqa_score"] < 1
    assert found.by_question_type.keys() == {"is this", "what colour is"}


def test_questions_without_answers(load: Any) -> None:
    with pytest.raises(ValueError, match="0 predictions for 0 questions; expected one for each, at least one"):
        question_scores(load("vqa", "test"), predictions([0] * 6), asked.ANSWERS)


def test_statements_about_one_image(load: Any) -> None:
    statements = load("snli-ve")
    labels = classes(statements)
    assert statement_metrics(statements, predictions(labels)) == {"accuracy": 1.0}
    wrong = [(label + 1) % 3 if row == 2 else label for row, label in enumerate(labels)]
    assert statement_metrics(statements, predictions(wrong)) == {"accuracy": pytest.approx(1 - 1 / len(labels))}


def test_consistency_counts_a_sentence_with_all_its_pairs(load: Any) -> None:
    statements = load("nlvr2")
    labels = classes(statements)  # of five pairs: two sentences with two pairs, one with one
    wrong = [1 - label if row == 2 else label for row, label in enumerate(labels)]
    assert statement_metrics(statements, predictions(wrong)) == {
        "accuracy": pytest.approx(0.8),
        "consistency": pytest.approx(2 / 3),
    }
