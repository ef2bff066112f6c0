"""The kinds of prepared sets: what a row of each holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from bridgetower.files import escaped

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


def problem_of(text: str | Question | Statement) -> str | None:
    """Says why a caption, a question or a statement cannot be used; None if it can.

    All must have words and be valid Unicode; captions and statements are stripped, statements have identifiers.
    """
    if isinstance(text, Question):
        name, words = f"question {text.question_id}", text.question.strip()
    elif isinstance(text, Statement):
        name, words = f"statement {text.statement_id!r}", text.text
    else:
        name, words = "caption", text
    if not words:
        return f"{name} is empty"
    if words != words.strip():
        return f"{name} has spaces at its ends"
    if isinstance(text, Statement) and not text.statement_id:
        return f"{name} has no identifier"
    content = words if isinstance(text, str) else json.dumps(vars(text), ensure_ascii=False)
    return None if escaped(content) == content else f"{name} is not valid Unicode"


def nlvr2_sentence(statement_id: str) -> str | None:
    """Names the sentence of an identifier of NLVR2, with which all its image pairs are one group.

    Args:
        statement_id: As NLVR2 publishes it: split, set, pair and sentence, such as dev-850-0-1.

    Returns:
        Split, set and sentence; None if it is no identifier of NLVR2.
    """
    parts = statement_id.split("-")
    return f"{parts[0]}-{parts[1]}-{parts[3]}" if len(parts) == 4 else None


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
