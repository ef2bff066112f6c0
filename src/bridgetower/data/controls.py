"""Examples with pictures that are not theirs: what a model gets right on them, it knows without looking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from torch.utils.data import Dataset

from bridgetower.data.batch import Batch
from bridgetower.data.sampling import BatchKey, Examples

_PICTURES = ("pixel_values", "pixel_values_2")


class WithOtherPictures(Dataset[Batch]):
    """Each example with the picture, or both pictures, of the example half a set away."""

    def __init__(self, examples: Examples) -> None:
        """Wraps a set.

        Args:
            examples: Questions or statements.

        Raises:
            ValueError: There is only one example, so that there is no other picture.
        """
        if len(examples) < 2:
            raise ValueError(f"{len(examples)} example has no other picture; expected at least 2 examples")
        self._examples, self._shift = examples, len(examples) // 2

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, key: BatchKey) -> Batch:
        """Builds the batch that `key` names, with other pictures."""
        batch, others = self._batch(key.examples, key), self._batch(self._shifted(key.examples), key)
        pictures: dict[str, Any] = {
            item.name: getattr(others, item.name) for item in fields(batch) if item.name in _PICTURES
        }
        return replace(batch, **pictures)

    def _batch(self, examples: Sequence[int], key: BatchKey) -> Batch:
        batch: Batch = self._examples[replace(key, examples=tuple(examples))]
        return batch

    def _shifted(self, examples: Sequence[int]) -> list[int]:
        return [(example + self._shift) % len(self) for example in examples]
