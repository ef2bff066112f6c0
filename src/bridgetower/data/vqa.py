"""Questions about pictures as batches, with the scores of the answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from bridgetower.data.answers import soft_targets
from bridgetower.data.batch import VqaBatch
from bridgetower.data.entries import Entries
from bridgetower.data.pictures import Pictures
from bridgetower.data.sampling import BatchKey


class VqaQuestions(Dataset[VqaBatch]):
    """(picture, question) examples, addressed by batch.

    Attributes:
        answers: Normalised answers that can be chosen, in the order of the classes.
    """

    def __init__(
        self, pictures: Pictures, answers: Sequence[str], *, answerable: bool = False, answered: bool = False
    ) -> None:
        """Finds the questions.

        Args:
            pictures: Of kind `vqa`.
            answers: The vocabulary.
            answerable: Leave out questions to which no annotator gave an answer of the vocabulary.
            answered: Every question must have answers of annotators.

        Raises:
            ValueError: There is no question left, or one without the answers that it must have.
        """
        self.answers = tuple(answers)
        self._number_of = {answer: number for number, answer in enumerate(answers)}
        self._pictures = pictures
        self._entries = Entries(pictures, self._is_answerable if answerable else None)
        unanswered = next((entry for entry in self if not entry["answers"]), None) if answered else None
        if unanswered:
            raise ValueError(
                f"question {unanswered['question_id']} of split {', '.join(pictures.splits)} has no answers; choose a "
                "split that has"
            )

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields every question with its annotations, in order."""
        return iter(self._entries)

    def __getitem__(self, key: BatchKey) -> VqaBatch:
        """Builds the batch that `key` names; it has targets where all its questions have annotators.

        Raises:
            ValueError: A picture cannot be decoded; its id is named.
        """
        generator = torch.Generator().manual_seed(key.seed)
        images, questions = self._entries.chosen(key.examples)
        processor = self._pictures.processor
        text = processor.pad(processor.token_ids([entry["question"] for entry in questions], truncate=True))
        known = all(entry["answers"] for entry in questions)
        return VqaBatch(
            pixel_values=self._pictures.views(images, generator),
            input_ids=text.input_ids,
            attention_mask=text.attention_mask,
            targets=torch.stack([self._targets(entry) for entry in questions]) if known else None,
            ids=tuple(str(entry["question_id"]) for entry in questions),
            seed=key.seed,
        )

    def _is_answerable(self, entry: dict[str, Any]) -> bool:
        return bool(soft_targets(entry["answers"], self._number_of))

    def _targets(self, entry: dict[str, Any]) -> Float[Tensor, " k"]:
        targets = torch.zeros(len(self.answers))
        for answer, score in soft_targets(entry["answers"], self._number_of).items():
            targets[self._number_of[answer]] = score
        return targets
