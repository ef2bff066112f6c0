"""Statements about one picture (SNLI-VE) or two (NLVR2) as batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from bridgetower.data.batch import Nlvr2Batch, SnliVeBatch
from bridgetower.data.entries import Entries
from bridgetower.data.pictures import Pictures
from bridgetower.data.sampling import BatchKey
from bridgetower.data.schema import SNLI_VE, Schema


class Statements(Dataset[SnliVeBatch | Nlvr2Batch]):
    """(picture or pictures, statement) examples, addressed by batch."""

    def __init__(self, pictures: Pictures, *, labelled: bool = False) -> None:
        """Finds the statements.

        Args:
            pictures: Of kind `snli-ve` or `nlvr2`.
            labelled: Every statement must have a label.

        Raises:
            ValueError: There is no statement, or one without the label that it must have.
        """
        self._pictures, self._entries = pictures, Entries(pictures)
        if labelled:
            self.labels()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields every statement, in order."""
        return iter(self._entries)

    @property
    def schema(self) -> Schema:
        """Of SNLI-VE or NLVR2."""
        return self._pictures.schema

    def labels(self) -> Int[Tensor, " n"]:
        """Returns the class of every statement, in order.

        Raises:
            ValueError: One has no label.
        """
        return torch.tensor([self.label(entry) for entry in self])

    def __getitem__(self, key: BatchKey) -> SnliVeBatch | Nlvr2Batch:
        """Builds the batch that `key` names; it has labels where all its statements have.

        Raises:
            ValueError: A picture cannot be decoded; its id is named.
        """
        generator = torch.Generator().manual_seed(key.seed)
        images, statements = self._entries.chosen(key.examples)
        pictures, processor = self._pictures, self._pictures.processor
        text = processor.pad(processor.token_ids([entry["text"] for entry in statements], truncate=True))
        known = all(entry["label"] for entry in statements)
        values: dict[str, Any] = {
            "pixel_values": pictures.views(images, generator),
            "input_ids": text.input_ids,
            "attention_mask": text.attention_mask,
            "labels": torch.tensor([self.label(entry) for entry in statements]) if known else None,
            "ids": tuple(entry["statement_id"] for entry in statements),
            "seed": key.seed,
        }
        if pictures.schema is SNLI_VE:
            return SnliVeBatch(**values)
        return Nlvr2Batch(pixel_values_2=pictures.views(images, generator, "image_2"), **values)

    def label(self, entry: dict[str, Any]) -> int:
        """Returns the class of a statement.

        Raises:
            ValueError: It has no label.
        """
        names = self._pictures.schema.labels
        if entry["label"] not in names:
            raise ValueError(
                f"statement {entry['statement_id']} of split {', '.join(self._pictures.splits)} has the label "
                f"{entry['label']!r}; expected one of {', '.join(names)}: choose a split that has labels"
            )
        return list(names).index(entry["label"])
