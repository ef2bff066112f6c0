"""Examples in a fixed number of views each, with the hidden states of frozen towers in the place of their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from bridgetower.data.batch import Batch, BatchDataset, BatchKey, CachedFeatures, derive_seed, joined
from bridgetower.rows import RowFiles

TEXT_FIELDS = ("input_ids", "masked_input_ids")
"""Fields of batches that the text tower reads."""

_KEPT = 65_536  # examples whose small tensors stay in memory


@dataclass(frozen=True, kw_only=True)
class FrozenImages:
    """Views of the images of a set, as cached hidden states of the image tower.

    Attributes:
        files: One row for each image and view.
        num_views: Of each image.
        seed: Of the views.
    """

    files: RowFiles
    num_views: int
    seed: int

    def views(self, images: Sequence[int], generator: torch.Generator) -> CachedViews:
        """Draws a view of each image."""
        firsts = [image * self.num_views for image in images]
        return CachedViews(self.files, firsts, num_views=self.num_views).drawn(generator)

    def first_views(self, images: Sequence[int]) -> CachedFeatures:
        """Returns the first view of each image."""
        return CachedFeatures(self.files, [image * self.num_views for image in images])

    def place(self, row: int) -> tuple[int, torch.Generator]:
        """Returns the image of a row, and what its view is drawn from."""
        image, view = divmod(row, self.num_views)
        return image, torch.Generator().manual_seed(derive_seed(self.seed, "view of an image", image, view))


class CachedViews(CachedFeatures):
    """Views of images that can be drawn again, so that examples whose texts are kept see all views."""

    def __init__(
        self, files: RowFiles, firsts: Sequence[int], *, num_views: int, rows: Sequence[int] | None = None
    ) -> None:
        """Takes a view of each image.

        Args:
            files: Of all views.
            firsts: Row of each image's first view.
            num_views: Of each image.
            rows: The views; None: the first ones.
        """
        super().__init__(files, firsts if rows is None else rows)
        self.firsts, self.num_views = tuple(firsts), num_views

    def drawn(self, generator: torch.Generator) -> CachedViews:
        """Returns other views of the same images."""
        views = torch.randint(self.num_views, (len(self),), generator=generator).tolist()
        rows = [first + view for first, view in zip(self.firsts, views, strict=True)]
        return CachedViews(self.files, self.firsts, num_views=self.num_views, rows=rows)

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Joins views of the same files."""
        joined_rows = CachedFeatures.cat(parts).rows
        firsts = [row for part in parts for row in part.firsts]
        return cls(parts[0].files, firsts, num_views=parts[0].num_views, rows=joined_rows)


class FrozenTexts:
    """Texts as the text tower sees them, found by their token ids."""

    def __init__(self, files: RowFiles, keys: Sequence[bytes]) -> None:
        """Numbers the texts.

        Args:
            files: One row for each text.
            keys: `text_key` of each row.
        """
        self.files = files
        self._row_of = {key: row for row, key in enumerate(keys)}

    def features(self, input_ids: Int[Tensor, "b l"], attention_mask: Int[Tensor, "b l"]) -> CachedFeatures:
        """Looks texts up.

        Raises:
            KeyError: One was not computed.
        """
        return CachedFeatures(self.files, [self._row_of[key] for key in text_keys(input_ids, attention_mask)])


class FrozenDataset(Dataset[Batch]):
    """Examples in a fixed number of views each, with cached features in the place of pixel values and token ids.

    What is drawn of an example's texts, such as masks or false texts, is drawn once and for all in each view of it; its
    images have views of their own.
    """

    def __init__(self, examples: BatchDataset, num_views: int, seed: int, texts: FrozenTexts | None = None) -> None:
        """Wraps examples whose images are frozen.

        Args:
            examples: Their images come as cached features.
            num_views: Of each example.
            seed: Of the views.
            texts: None leaves token ids as they are.
        """
        self.examples, self.num_views, self.seed, self.texts = examples, num_views, seed, texts
        self._part = lru_cache(_KEPT)(self.part)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def set_numbers(self) -> Int[Tensor, " n"]:
        """The set of each example.

        Raises:
            AttributeError: The wrapped examples do not tell.
        """
        numbers: Tensor = self.examples.set_numbers  # type: ignore[attr-defined]
        return numbers

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_part"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._part = lru_cache(_KEPT)(self.part)

    def __getitem__(self, key: BatchKey) -> Batch:
        """Draws a view of each example of the batch that `key` names, and views of their images."""
        generator = torch.Generator().manual_seed(key.seed)
        batch = self._joined(key, generator)
        values: dict[str, Any] = {
            name: value.drawn(generator) for name, value in vars(batch).items() if isinstance(value, CachedViews)
        }
        if key.step:
            values["step_labels"] = torch.stack([self._num_labels(other) for other in key.step]).sum()
        return replace(batch, **values)

    def _joined(self, key: BatchKey, generator: torch.Generator) -> Any:
        """Puts a drawn view of each example together."""
        drawn = torch.randint(self.num_views, (len(key.examples),), generator=generator).tolist()
        parts = [self._part(example, view) for example, view in zip(key.examples, drawn, strict=True)]
        return joined(parts, seed=key.seed)

    def _num_labels(self, key: BatchKey) -> Int[Tensor, ""]:
        """Number of labels in the batch of captions that `key` names."""
        num_labels: Tensor = self._joined(key, torch.Generator().manual_seed(key.seed)).num_labels
        return num_labels

    def part(self, example: int, view: int) -> Batch:
        """Returns a batch of one example, with an explicit mask."""
        seed = derive_seed(self.seed, "view of an example", example, view)
        batch: Any = self.examples[BatchKey((example,), seed)]
        names = [field.name for field in fields(batch) if field.name in TEXT_FIELDS]
        mask = batch.attention_mask
        mask = torch.ones_like(batch.input_ids) if mask is None else mask
        values = {} if self.texts is None else {name: self.texts.features(getattr(batch, name), mask) for name in names}
        whole: Batch = replace(batch, attention_mask=mask, **values)
        return whole


def text_keys(input_ids: Int[Tensor, "b l"], attention_mask: Int[Tensor, "b l"]) -> list[bytes]:
    """Returns for each text what it is found by; padding does not count."""
    return [ids[mask.bool()].numpy().tobytes() for ids, mask in zip(input_ids, attention_mask, strict=True)]


def key_ids(key: bytes) -> Int[Tensor, " l"]:
    """Returns the token ids that `text_keys` made a key of."""
    return torch.frombuffer(bytearray(key), dtype=torch.int64)


def needed_texts(examples: FrozenDataset) -> list[bytes]:
    """Returns the keys of all texts in all views of some examples, without repeats, short ones first."""
    keys: set[bytes] = set()
    for example in range(len(examples)):
        for view in range(examples.num_views):
            part: Any = examples.part(example, view)
            for name in TEXT_FIELDS:
                if hasattr(part, name):
                    keys.update(text_keys(getattr(part, name), part.attention_mask))
    return sorted(keys, key=lambda key: (len(key), key))
