"""Metrics of questions and statements from predictions: those of the metrics on the same annotations."""

from pathlib import Path
from typing import Any

import pytest

import asked
from bridgetower.evaluation.class_metrics import vqa_score, vqa_scores
from bridgetower.processor import Processor
from bridgetower.tasks.entries import statement_metrics


@pytest.fixture
def load(tmp_path: Path, tiny_processor: Processor) -> Any:
    def make(kind: str) -> list[Any]:
        return list(asked.examples(asked.write_set(tmp_path / kind, kind), kind, tiny_processor, "validation"))

    return make


def test_questions(load: Any) -> None:
    questions = load("vqa")
    given = [asked.ANSWERS[number % len(asked.ANSWERS)] for number in range(3, 13)]
    scores = [vqa_score(answer, entry["answers"]) for answer, entry in zip(given, questions, strict=True)]
    metrics, by_type = vqa_scores(given, questions)
    assert metrics["vqa_score"] == pytest.approx(sum(scores) / 10, abs=5e-5)
    assert metrics["vqa_score_other"] == pytest.approx(sum(scores[::2]) / 5, abs=5e-5)
    assert metrics["vqa_score_yes_no"] == pytest.approx(sum(scores[1::2]) / 5, abs=5e-5)
    assert 0 < metrics["vqa_score"] < 1
    assert by_type["by_question_type"].keys() == {"is this", "what colour is"}


def test_statements_about_one_image(load: Any) -> None:
    statements = load("snli-ve")
    labels = [entry["label"] for entry in statements]
    assert statement_metrics(statements, labels, is_nlvr2=False) == {"accuracy": 1.0}
    wrong = ["other" if row == 2 else label for row, label in enumerate(labels)]
    expected = {"accuracy": pytest.approx(1 - 1 / len(labels))}
    assert statement_metrics(statements, wrong, is_nlvr2=False) == expected
    unknown = {**statements[0], "label": ""}
    assert statement_metrics([unknown, *statements], ["other", *wrong], is_nlvr2=False) == expected
    assert statement_metrics([unknown], ["other"], is_nlvr2=False) == {}


def test_consistency_counts_a_sentence_with_all_its_pairs(load: Any) -> None:
    statements = load("nlvr2")  # five pairs: two sentences with two pairs, one with one
    wrong = ["?" if row == 2 else entry["label"] for row, entry in enumerate(statements)]
    assert statement_metrics(statements, wrong, is_nlvr2=True) == {
        "accuracy": pytest.approx(0.8),
        "consistency": pytest.approx(2 / 3),
    }
    assert statement_metrics([{**statements[0], "statement_id": "mine"}], ["?"], is_nlvr2=True) == {"accuracy": 0.0}
