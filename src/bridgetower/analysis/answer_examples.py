"""Questions about pictures to look at, with what a model answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bridgetower.evaluation.grounding import Judged


@dataclass(frozen=True, kw_only=True)
class AnswerExample:
    """A question, the right answer and the model's.

    Attributes:
        picture: File content.
        question: The words.
        answer: The right answer.
        given: What the model answers.
    """

    picture: bytes
    question: str
    answer: str
    given: str

    @property
    def is_right(self) -> bool:
        """Whether the model answers right."""
        return self.given == self.answer


def answer_examples(judged: Judged, pictures: Sequence[bytes], *, count: int) -> list[AnswerExample]:
    """Chooses, of each topic, the first questions that are answered right and the first that are not.

    Args:
        judged: Of a set with one question to each picture.
        pictures: Files of the pictures, in order.
        count: Of either per topic; fewer if there are no more.

    Raises:
        ValueError: There is not one picture for each question, or the count is below 1.
    """
    if len(pictures) != len(judged.told) or count < 1:
        raise ValueError(
            f"{len(pictures)} pictures for {len(judged.told)} questions, count {count}; expected as many pictures as "
            "questions and a count of at least 1"
        )
    examples = [
        AnswerExample(picture=picture, question=told.text, answer=told.answer, given=given)
        for picture, told, given in zip(pictures, judged.told, judged.answers, strict=True)
    ]
    chosen = []
    for topic in dict.fromkeys(told.topic for told in judged.told):
        about = [example for example, told in zip(examples, judged.told, strict=True) if told.topic == topic]
        for right in (True, False):
            chosen += [example for example in about if example.is_right is right][:count]
    return chosen
