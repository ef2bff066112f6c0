"""Accuracy with the right image, with another one, and from the words alone, by topic."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Dataset

from bridgetower.data.batches.batch import Batch, BatchDataset, BatchKey
from bridgetower.data.batches.examples import EntryDataset
from bridgetower.data.config import DataConfig
from bridgetower.data.sets.schema import VQA
from bridgetower.evaluation.class_metrics import predict_classes
from bridgetower.inference.predictor import Predictor
from bridgetower.tasks.spec import ExampleSource
from bridgetower.tasks.table import TASKS
from bridgetower_demo.results import Grounding

_PIXELS = ("pixel_values", "pixel_values_2")
ALL = "overall"
"""Stands for all topics together."""


class TextExample(NamedTuple):
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
    """Predictions of a model on a test split.

    Attributes:
        examples: In order.
        answers: The model's predictions, in the same order.
        groundings: Of each topic, and of `ALL`.
    """

    examples: tuple[TextExample, ...]
    answers: tuple[str, ...]
    groundings: Mapping[str, Grounding]


def judge(
    predictor: Predictor,
    kind: str,
    folder: Path,
    *,
    topic_of: Callable[[str], str] | None = None,
    batch_size: int = 128,
) -> Judged:
    """Answers the test split with the right and with other images, and with the words alone.

    Args:
        predictor: The model with its preprocessing.
        kind: Of the task, one whose examples are entries with one right answer or label.
        folder: A prepared set with splits for training and test, whose annotators, if it has several, agree.
        topic_of: Topic of a statement by its identifier; None takes them all as one. Questions have a type.
        batch_size: Examples at once.

    Raises:
        FileNotFoundError: The folder or a split is missing.
        ValueError: The set is of another kind, or the model lacks the head.
    """
    spec = TASKS[kind]
    assert spec.head is not None
    names, task = predictor.class_names(spec.head), spec.config()
    data, processor = DataConfig(folders=(str(folder),), cache=True), predictor.processor
    source = ExampleSource(
        data=data, splits=("test",), processor=processor, task=task, names=names, use="validate"
    )
    module = spec.module(predictor.model, task)

    def predicted(chosen: BatchDataset) -> list[str]:
        predictions = predict_classes(module, chosen, batch_size=batch_size)
        return [names[number] for number in predictions.classes.tolist()]

    examples = spec.examples(source)
    texts = tuple(_texts(examples, topic_of))
    training = _texts(spec.examples(replace(source, splits=("train",))), topic_of)
    answers = predicted(examples)
    given = {
        "model": answers,
        "other_image": predicted(WithOtherImages(examples)),
        "text_only": text_only_answers(
            [(one.text, one.answer) for one in training], [one.text for one in texts]
        ),
        "majority": [majority_answer(one.answer for one in training)] * len(texts),
    }
    topics = [*dict.fromkeys(one.topic for one in texts), ALL]
    return Judged(
        examples=texts,
        answers=tuple(answers),
        groundings={topic: _grounding(texts, given, topic) for topic in topics},
    )


def _texts(examples: EntryDataset, topic_of: Callable[[str], str] | None) -> Sequence[TextExample]:
    if examples.schema is VQA:
        return [
            TextExample(entry["question_type"], entry["question"], entry["answers"][0])
            for entry in examples
        ]
    named = topic_of or (lambda _: ALL)
    return [
        TextExample(named(entry["statement_id"]), entry["text"], entry["label"])
        for entry in examples
    ]


def _grounding(
    texts: Sequence[TextExample], given: Mapping[str, Sequence[str]], topic: str
) -> Grounding:
    chosen = [number for number, one in enumerate(texts) if topic in (one.topic, ALL)]

    def share(answers: Sequence[str]) -> float:
        return sum(answers[number] == texts[number].answer for number in chosen) / len(chosen)

    return Grounding(
        number=len(chosen), **{name: share(answers) for name, answers in given.items()}
    )


def majority_answer(answers: Iterable[str]) -> str:
    """Returns the commonest answer, of equally common ones the first in alphabetical order."""
    counts = Counter(answers)
    if not counts:
        raise ValueError("no answers; expected those of the training set")
    return min(counts, key=lambda answer: (-counts[answer], answer))


def text_only_answers(training: Sequence[tuple[str, str]], texts: Iterable[str]) -> list[str]:
    """Answers each text with what it is answered most in training; no model can do better without the image.

    That holds where texts come again, as questions made by rules do. A text that training does not have gets the
    commonest answer of all.

    Args:
        training: Text and answer of the training examples.
        texts: To be answered.
    """
    given: Mapping[str, list[str]] = defaultdict(list)
    for text, answer in training:
        given[text].append(answer)
    commonest = majority_answer(answer for _, answer in training)
    majority = {text: majority_answer(answers) for text, answers in given.items()}
    return [majority.get(text, commonest) for text in texts]


class WithOtherImages(Dataset[Batch]):
    """Each example with the image, or both images, of the example half a set away.

    What is right on them does not come from the image.
    """

    def __init__(self, examples: BatchDataset) -> None:
        """Wraps a set.

        Args:
            examples: Questions or statements.

        Raises:
            ValueError: There is only one example, so that there is no other image.
        """
        if len(examples) < 2:
            raise ValueError(
                f"{len(examples)} example has no other image; expected at least 2 examples"
            )
        self._examples, self._shift = examples, len(examples) // 2

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, key: BatchKey) -> Batch:
        """Builds the batch that `key` names, with other images."""
        others = tuple((example + self._shift) % len(self) for example in key.examples)
        shown = self._examples[replace(key, examples=others)]
        return replace(self._examples[key], **{name: getattr(shown, name) for name in _PIXELS})
