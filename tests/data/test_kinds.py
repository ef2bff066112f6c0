"""What rows of each kind hold."""

import pytest

from bridgetower.data.kinds import (
    KINDS,
    LABELS,
    Question,
    Statement,
    core_columns,
    core_features,
    nlvr2_sentence,
    problem_of,
    text_of,
)


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("captions", ("image", "image_id", "captions")),
        ("vqa", ("image", "image_id", "questions")),
        ("snli-ve", ("image", "image_id", "statements")),
        ("nlvr2", ("image", "image_2", "image_id", "statements")),
    ],
)
def test_columns(kind: str, columns: tuple[str, ...]) -> None:
    assert core_columns(kind) == columns  # type: ignore[arg-type]
    assert tuple(core_features(kind)) == columns  # type: ignore[arg-type]
    assert kind in KINDS


@pytest.mark.parametrize("said", ["a dog", {"question": "a dog", "answers": []}, {"text": "a dog", "label": ""}])
def test_text_of_what_is_said(said: object) -> None:
    assert text_of(said) == "a dog"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("dev-850-2-1", "dev-850-1"), ("test1-0-0-0", "test1-0-0"), ("dev-850-2", None), ("dev-850-2#1", None)],
)
def test_the_sentence_of_an_identifier(name: str, sentence: str | None) -> None:
    assert nlvr2_sentence(name) == sentence


def test_labels_are_in_the_order_of_the_official_classes() -> None:
    assert LABELS["snli-ve"] == ("contradiction", "neutral", "entailment")
    assert LABELS["nlvr2"] == ("False", "True")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a dog", None),
        ("", "caption is empty"),
        (" a", "caption has spaces at its ends"),
        ("half \ud83d", "caption is not valid Unicode"),
        (Question(question_id=7, question=" Why? "), None),
        (Question(question_id=7, question=" \n"), "question 7 is empty"),
        (Question(question_id=7, question="Why?", answers=("so", "\ud83d")), "question 7 is not valid Unicode"),
        (Statement(statement_id="x", text="a"), None),
        (Statement(statement_id="x", text=""), "statement 'x' is empty"),
        (Statement(statement_id="x", text="a "), "statement 'x' has spaces at its ends"),
        (Statement(statement_id="", text="a"), "statement '' has no identifier"),
        (Statement(statement_id="x", text="\udc00"), "statement 'x' is not valid Unicode"),
    ],
)
def test_what_cannot_be_used(text: str | Question | Statement, problem: str | None) -> None:
    assert problem_of(text) == problem
