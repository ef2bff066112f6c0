"""What rows of each kind hold."""

import pytest

from bridgetower.data.kinds import KINDS, LABELS, Question, Statement, core_columns, core_features, text_of


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


def test_labels_are_in_the_order_of_the_official_classes() -> None:
    assert LABELS["snli-ve"] == ("contradiction", "neutral", "entailment")
    assert LABELS["nlvr2"] == ("False", "True")


def test_refuses_an_empty_question() -> None:
    with pytest.raises(ValueError, match="question 7 is empty; leave it out"):
        Question(question_id=7, question=" ")


@pytest.mark.parametrize(("statement_id", "text"), [("", "a"), ("x", ""), ("x", " a")])
def test_refuses_an_unfit_statement(statement_id: str, text: str) -> None:
    with pytest.raises(ValueError, match="give an identifier and a text, stripped and not empty"):
        Statement(statement_id=statement_id, text=text)
