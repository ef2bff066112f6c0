"""The kinds of prepared sets: what a row of each holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Kind = Literal["captions", "vqa", "snli-ve", "nlvr2"]
KINDS: tuple[Kind, ...] = get_args(Kind)

TEXT_COLUMN: Mapping[Kind, str] = {
    "captions": "captions",
    "vqa": "questions",
    "snli-ve": "statements",
    "nlvr2": "statements",
}
LABELS: Mapping[Kind, Sequence[str]] = {
    "snli-ve": ("contradiction", "neutral", "entailment"),
    "nlvr2": ("False", "True"),
}
"""Labels of statements, in the order of the official class numbers; a statement without one has an empty label."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a picture.

    Attributes:
        question_id: The official number.
        question: What is asked.
        question_type: Its first words, as the annotations have them; empty if unknown.
        answer_type: "yes/no", "number" or "other"; empty if unknown.
        answers: What the annotators said, as they said it; none in a test split.
    """

    question_id: int
    question: str
    question_type: str = ""
    answer_type: str = ""
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks that something is asked."""
        if not self.question.strip():
            raise ValueError(f"question {self.question_id} is empty; leave it out")


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A statement about one picture or two.

    Attributes:
        statement_id: The official identifier.
        text: What is said, stripped.
        label: Whether it holds, one of `LABELS` of the kind; empty if unknown.
    """

    statement_id: str
    text: str
    label: str = ""

    def __post_init__(self) -> None:
        """Checks that there is an identifier and a stripped text."""
        if not self.statement_id or not self.text or self.text != self.text.strip():
            raise ValueError(
                f"statement {self.statement_id!r} is {self.text!r}; give an identifier and a text, stripped and not "
                "empty"
            )


def image_columns(kind: Kind) -> tuple[str, ...]:
    """Columns with pictures."""
    return ("image", "image_2") if kind == "nlvr2" else ("image",)


def text_of(said: Any) -> str:
    """The words of a caption, a question or a statement, as a row holds them."""
    text: str = said if isinstance(said, str) else said["question" if "question" in said else "text"]
    return text


def core_columns(kind: Kind) -> tuple[str, ...]:
    """Columns that every set of the kind has."""
    return (*image_columns(kind), "image_id", TEXT_COLUMN[kind])


def core_features(kind: Kind) -> dict[str, Any]:
    """The `datasets` feature of each of `core_columns`."""
    import datasets

    text = datasets.Value("string")
    statement = {"statement_id": text, "text": text, "label": text}
    question = {
        "question_id": datasets.Value("int64"),
        "question": text,
        "question_type": text,
        "answer_type": text,
        "answers": datasets.List(text),
    }
    entry = {"captions": text, "questions": question, "statements": statement}[TEXT_COLUMN[kind]]
    return {
        **{column: datasets.Image() for column in image_columns(kind)},
        "image_id": text,
        TEXT_COLUMN[kind]: datasets.List(entry),
    }
