"""Rows of GLUE as batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bridgetower.data.batch import TextBatch
from bridgetower.data.config import GlueName
from bridgetower.data.files import digests_of
from bridgetower.data.glue import GLUE, glue_file, read_glue
from bridgetower.data.sampling import BatchKey
from bridgetower.processor import Processor


class GlueTexts(Dataset[TextBatch]):
    """Texts or pairs of texts with their labels, addressed by batch.

    Attributes:
        rows: As the files have them.
        files: That were read.
    """

    def __init__(
        self,
        folder: str | Path,
        name: GlueName,
        splits: str | Sequence[str],
        processor: Processor,
        *,
        max_errors: int = 0,
    ) -> None:
        """Reads the files of one or several splits; see `read_glue`.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: There is no such split, a column is missing, or rows are bad.
        """
        names = (splits,) if isinstance(splits, str) else tuple(splits)
        self.task, self._processor = GLUE[name], processor
        self.files = [glue_file(folder, name, split) for split in names]
        self.rows = [row for split in names for row in read_glue(folder, name, split, max_errors=max_errors)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: BatchKey) -> TextBatch:
        """Builds the batch that `key` names; it has labels where the rows have."""
        rows = [self.rows[example] for example in key.examples]
        text = self._processor.pad(self._processor.pair_ids([row.texts for row in rows]))
        return TextBatch(
            input_ids=text.input_ids,
            attention_mask=text.attention_mask,
            labels=self._labels([row.label for row in rows]) if all(row.label for row in rows) else None,
            ids=tuple(map(str, key.examples)),
            seed=key.seed,
        )

    def labels(self) -> Tensor:
        """Returns the class of every row, or its number.

        Raises:
            ValueError: The rows have no labels.
        """
        if not all(row.label for row in self.rows):
            raise ValueError(f"{', '.join(map(str, self.files))} has no labels; choose a split that has")
        return self._labels([row.label for row in self.rows])

    def digests(self) -> dict[str, str]:
        """Returns the digest of every file, by path."""
        return digests_of(self.files)

    def _labels(self, labels: Sequence[str]) -> Tensor:
        if not self.task.classes:
            return torch.tensor([float(label) for label in labels])
        return torch.tensor([self.task.classes.index(label) for label in labels])
