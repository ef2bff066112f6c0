"""Small pictures and rows of prepared sets with them."""

import io

import numpy as np
from PIL import Image

from bridgetower.data.kinds import Question, Statement
from bridgetower.data.records import PairRecord, QuestionRecord, Record, StatementRecord


def png(shade: int, size: int = 4) -> bytes:
    """Returns a grey picture."""
    stream = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), shade, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def record(number: int, **changes: object) -> Record:
    """Returns a picture with two captions."""
    captions = (f"shade {number}", "grey")
    return Record(**{**_picture(number), "captions": captions, **changes})  # type: ignore[arg-type]


def question_record(number: int, **changes: object) -> QuestionRecord:
    """Returns a picture with two questions, the second of a test split."""
    first = Question(
        question_id=10 * number,
        question="How dark is it?",
        question_type="how",
        answer_type="number",
        answers=(str(number),) * 10,
    )
    questions = first, Question(question_id=10 * number + 1, question="What is it?")
    return QuestionRecord(**{**_picture(number), "questions": questions, **changes})  # type: ignore[arg-type]


def statement_record(number: int, **changes: object) -> StatementRecord:
    """Returns a picture with two statements, one labelled."""
    statements = (
        Statement(statement_id=f"{number}#a", text="It is grey.", label="entailment"),
        Statement(statement_id=f"{number}#b", text="It is a cat."),
    )
    return StatementRecord(**{**_picture(number), "statements": statements, **changes})  # type: ignore[arg-type]


def pair_record(number: int, **changes: object) -> PairRecord:
    """Returns two pictures with a statement."""
    values: dict[str, object] = {
        **_picture(number),
        "image_2": png(number + 100),
        "file_name_2": f"{number}-2.png",
        "statements": (Statement(statement_id=f"dev-{number}-0-0", text="The left one is darker.", label="True"),),
    }
    return PairRecord(**{**values, **changes})  # type: ignore[arg-type]


def _picture(number: int) -> dict[str, object]:
    return {"image": png(number), "file_name": f"{number}.png", "image_id": f"id-{number}"}
