"""How much of what a model gets right it sees: beside it, what the words alone give, by topic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from torch import nn

from bridgetower.data.config import DataConfig
from bridgetower.data.controls import WithOtherPictures
from bridgetower.data.pictures import Pictures
from bridgetower.data.sampling import Examples
from bridgetower.data.schema import SCHEMAS
from bridgetower.data.statements import Statements
from bridgetower.data.vqa import VqaQuestions
from bridgetower.evaluation.predictions import Predictions, predict_classes
from bridgetower.evaluation.shares import Grounding
from bridgetower.evaluation.text_only import majority_answer, text_only_answers
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.objectives.nlvr2 import Nlvr2Task
from bridgetower.objectives.snli_ve import SnliVeTask
from bridgetower.objectives.vqa import VqaTask
from bridgetower.predictor import Predictor

JudgedKind = Literal["vqa", "snli-ve", "nlvr2"]

ALL = "overall"
"""Stands for all topics together."""

_TASKS: Mapping[JudgedKind, Callable[[BridgeTower], nn.Module]] = {
    "vqa": VqaTask,
    "snli-ve": SnliVeTask,
    "nlvr2": Nlvr2Task,
}


class Told(NamedTuple):
    """An example in words.

    Attributes:
        topic: What it is about.
        text: The question or statement.
        answer: The right answer or label.
    """

    topic: str
    text: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a model says of a test split.

    Attributes:
        told: The examples, in order.
        answers: What the model says, in the same order.
        groundings: Of each topic, and of `ALL`.
    """

    told: tuple[Told, ...]
    answers: tuple[str, ...]
    groundings: Mapping[str, Grounding]


def judge(
    predictor: Predictor,
    kind: JudgedKind,
    folder: Path,
    *,
    topic_of: Callable[[str], str] | None = None,
    batch_size: int = 128,
) -> Judged:
    """Answers the test split with the right and with other pictures, and with the words alone.

    Args:
        predictor: The model with its preprocessing.
        kind: Of the set.
        folder: A prepared set with splits for training and test, whose annotators, if it has several, agree.
        topic_of: Topic of a statement by its identifier; None takes them all as one. Questions have a type.
        batch_size: Examples at once.

    Raises:
        FileNotFoundError: The folder or a split is missing.
        ValueError: The set is of another kind, or the model lacks the head.
    """
    examples, names = _examples(predictor, kind, folder, "test")
    told = tuple(_told(examples, topic_of))
    training = list(_told(_examples(predictor, kind, folder, "train")[0], topic_of))
    task = _TASKS[kind](predictor.model)

    def said(chosen: Examples) -> list[str]:
        predictions: Predictions = predict_classes(task, chosen, batch_size=batch_size)
        return [names[number] for number in predictions.classes.tolist()]

    answers = said(examples)
    given = {
        "model": answers,
        "other_picture": said(WithOtherPictures(examples)),
        "text_only": text_only_answers([(one.text, one.answer) for one in training], [one.text for one in told]),
        "majority": [majority_answer(one.answer for one in training)] * len(told),
    }
    topics = [*dict.fromkeys(one.topic for one in told), ALL]
    return Judged(
        told=told, answers=tuple(answers), groundings={topic: _grounding(told, given, topic) for topic in topics}
    )


def _examples(
    predictor: Predictor, kind: JudgedKind, folder: Path, split: str
) -> tuple[VqaQuestions | Statements, Sequence[str]]:
    """The examples of a split, and the names of the model's answers."""
    pictures = Pictures(
        DataConfig(folders=(str(folder),), cache=True), split, predictor.processor, schema=SCHEMAS[kind]
    )
    if kind == "vqa":
        names = predictor.class_names("vqa")
        return VqaQuestions(pictures, names), names
    return Statements(pictures, labelled=True), SCHEMAS[kind].labels


def _told(examples: VqaQuestions | Statements, topic_of: Callable[[str], str] | None) -> Sequence[Told]:
    if isinstance(examples, VqaQuestions):
        return [Told(entry["question_type"], entry["question"], entry["answers"][0]) for entry in examples]
    named = topic_of or (lambda _: ALL)
    return [Told(named(entry["statement_id"]), entry["text"], entry["label"]) for entry in examples]


def _grounding(told: Sequence[Told], given: Mapping[str, Sequence[str]], topic: str) -> Grounding:
    chosen = [number for number, one in enumerate(told) if topic in (one.topic, ALL)]

    def share(answers: Sequence[str]) -> float:
        return sum(answers[number] == told[number].answer for number in chosen) / len(chosen)

    return Grounding(number=len(chosen), **{name: share(answers) for name, answers in given.items()})
