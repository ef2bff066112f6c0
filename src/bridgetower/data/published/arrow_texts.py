"""Rows of ViLT-style Arrow files to texts: captions, questions, statements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bridgetower.data.kinds import LABELS, Question, Statement, nlvr2_sentence
from bridgetower.data.listing import Listing, Text

Row = Mapping[str, Any]

_OTHER_ANSWER = "(not among the answers)"  # no vocabulary has its normal form
_VOTES = {0.3: 1, 0.6: 2, 0.9: 3, 1.0: 4}
"""Annotators by the score that they make together."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What reading the rows of a set fills.

    Attributes:
        listing: Pictures and texts.
        answers: Answers of a VQA set by the numbers of their classes.
    """

    listing: Listing
    answers: dict[int, str] = field(default_factory=dict)


def captions(reading: Reading, name: str, row: Row) -> list[Text]:
    """Captions that are not empty."""
    captions = [caption.strip() for caption in row["caption"]]
    if not all(captions):
        reading.listing.leave_out("empty caption", name)
    return [caption for caption in captions if caption]


def questions(reading: Reading, name: str, row: Row, *, annotators: int) -> list[Text]:
    """Questions with answers that give the scores of the row.

    Args:
        reading: Its answers are filled.
        name: Of the row.
        row: Columns of VQAv2 or VG-QA.
        annotators: People who answered each question.
    """
    asked: list[Text] = []
    for place, (question, number) in enumerate(zip(row["questions"], row["question_id"], strict=True)):
        answers: list[str] = []
        if row["answers"]:
            labels, words = row["answer_labels"][place], row["answers"][place]
            reading.answers.update(zip(labels, words, strict=True))
            answers = _said(words, row["answer_scores"][place], annotators)
        asked.append(Question(question_id=number, question=question, answers=tuple(answers)))
    return asked


def _said(answers: Sequence[str], scores: Sequence[float], annotators: int) -> list[str]:
    """What people must have said to get these scores, as far as it is known."""
    if annotators == 1:
        return list(answers)
    said = [answer for answer, score in zip(answers, scores, strict=True) for _ in range(_VOTES[round(score, 1)])]
    return said + [_OTHER_ANSWER] * (annotators - len(said))


def entailments(reading: Reading, name: str, row: Row) -> list[Text]:
    """Statements of SNLI-VE; wrong labels are bad."""
    labels = LABELS["snli-ve"]
    statements: list[Text] = []
    for place, ((_, text), label) in enumerate(zip(row["sentences"], row["labels"], strict=True)):
        identifier = f"{name}-{place}"
        if not 0 <= label < len(labels):
            reading.listing.bad(f"{identifier}: label {label}, expected 0 to {len(labels) - 1}")
        else:
            statements.append(Statement(statement_id=identifier, text=text.strip(), label=labels[label]))
    return statements


def pair_of(name: str) -> str:
    """The image pair that a row of NLVR2 is about: its identifier without the number of a sentence."""
    return name.rpartition("-")[0] if nlvr2_sentence(name) else name


def truths(reading: Reading, name: str, row: Row) -> list[Text]:
    """Statements of NLVR2; wrong labels are bad, and several statements under the identifier of one.

    The official code writes a row per image pair, without the numbers of its sentences. What is made of its name here
    is no identifier of NLVR2, so that nothing is computed or submitted by sentences that are not known.
    """
    statements: list[Text] = []
    said = list(zip(row["questions"], row["answers"], strict=True))
    known = nlvr2_sentence(name) is not None
    if known and len(said) > 1:
        reading.listing.bad(f"{name}: {len(said)} statements, expected the one that the identifier names")
        return []
    for place, (text, label) in enumerate(said):
        identifier = name if known else f"{name}#{place}"
        if label not in LABELS["nlvr2"]:
            reading.listing.bad(f"{identifier}: label {label!r}, expected the text True or False")
        else:
            statements.append(Statement(statement_id=identifier, text=text.strip(), label=label))
    return statements
