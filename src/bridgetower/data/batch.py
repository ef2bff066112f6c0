"""Batches: what a data loader hands to a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bridgetower.data.masking import IGNORED
from bridgetower.rows import RowFiles

# What fills up short texts, by field.
_FILLS = {"input_ids": 0, "masked_input_ids": 0, "attention_mask": 0, "mlm_labels": IGNORED}

_Batch = TypeVar("_Batch", bound="Batch")


TOKENS = "tokens"
"""The field of files with cached features: the bridged hidden states of each token [L, K, W]."""


class CachedFeatures:
    """Hidden states of a frozen tower for some images or texts, in the place of pixel values or token ids.

    They are read when they are asked for, so that they cost nothing on the way through a data loader.
    """

    def __init__(self, files: RowFiles, rows: Sequence[int]) -> None:
        self.files, self.rows = files, tuple(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def layers(self) -> list[Float[Tensor, "b l w"]]:
        """Returns the hidden states of every bridged layer; shorter rows are filled up with zeros."""
        return list(_padded(list(self.files.read(TOKENS, self.rows))).unbind(2))

    def last(self) -> Float[Tensor, "b l w"]:
        """Returns those of the last layer."""
        return _padded([values[:, -1] for values in self.files.read(TOKENS, self.rows)])

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Joins rows of the same files."""
        return cls(parts[0].files, [row for part in parts for row in part.rows])


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples of a task; what the task does not read is None.

    Attributes:
        ids: Names of the examples, for predictions and error messages.
        seed: Of everything that is drawn while the batch is processed.
        pixel_values, pixel_values_2: The image of each example, or both images.
        input_ids: The text of each example.
        attention_mask: 0 on padding; None if nothing is padded.
        labels: Classes [b], numbers [b], or a score of each class [b, k]; None where they are not known.
    """

    ids: tuple[str, ...] = ()
    seed: int = 0
    pixel_values: Float[Tensor, "b 3 h w"] | CachedFeatures | None = None
    pixel_values_2: Float[Tensor, "b 3 h w"] | CachedFeatures | None = None
    input_ids: Int[Tensor, "b l"] | CachedFeatures | None = None
    attention_mask: Int[Tensor, "b l"] | None = None
    labels: Int[Tensor, " b"] | Float[Tensor, " b"] | Float[Tensor, "b k"] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> Self:
        """Moves every tensor."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Copies every tensor to where a GPU reads it faster; torch's data loader calls it."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        mapped: dict[str, Any] = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **mapped)


@dataclass(frozen=True, kw_only=True)
class CaptionBatch(Batch):
    """Images with one caption each.

    Attributes:
        masked_input_ids, mlm_labels: The same texts with words hidden, and the hidden ids (-100 elsewhere).
        image_index: Equal numbers mark the same image, across all ranks.
        step_labels: Number of labels in all micro-batches of this process in the step, if it was asked for.
        mlm_weight: What MLM of this batch is multiplied with; None is 1.
    """

    pixel_values: Float[Tensor, "b 3 h w"] | CachedFeatures
    input_ids: Int[Tensor, "b l"] | CachedFeatures
    masked_input_ids: Int[Tensor, "b l"] | CachedFeatures
    mlm_labels: Int[Tensor, "b l"]
    image_index: Int[Tensor, " b"]
    step_labels: Int[Tensor, ""] | None = None
    mlm_weight: Float[Tensor, ""] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_labels(self) -> Int[Tensor, ""]:
        """Number of words to be predicted."""
        return (self.mlm_labels != IGNORED).sum()


@dataclass(frozen=True, kw_only=True)
class RankingBatch(Batch):
    """Images with one true and several false texts each.

    Attributes:
        input_ids: The texts of each image in succession, the true one first.
        attention_mask: Of all texts.
        image_index: Equal numbers mark the same image.
    """

    pixel_values: Float[Tensor, "b 3 h w"] | CachedFeatures
    input_ids: Int[Tensor, "t l"] | CachedFeatures
    attention_mask: Int[Tensor, "t l"] | None = None
    image_index: Int[Tensor, " b"]


def joined(parts: Sequence[_Batch], *, seed: int) -> _Batch:
    """Puts batches of one kind together; texts are filled up to the longest, and the mask goes where nothing is padded.

    Args:
        parts: With explicit masks.
        seed: Of the whole.
    """
    values: dict[str, Any] = {"seed": seed, "ids": tuple(name for part in parts for name in part.ids)}
    for field in fields(parts[0]):
        items = [getattr(part, field.name) for part in parts]
        if isinstance(items[0], CachedFeatures):
            values[field.name] = type(items[0]).cat(items)
        elif isinstance(items[0], Tensor):
            values[field.name] = _stacked(items, _FILLS.get(field.name))
    mask = values.get("attention_mask")
    if mask is not None and bool(mask.all()):
        values["attention_mask"] = None
    return replace(parts[0], **values)


def _stacked(tensors: Sequence[Tensor], fill: int | None) -> Tensor:
    if fill is None:
        return torch.cat(list(tensors))
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([F.pad(tensor, (0, longest - tensor.shape[1]), value=fill) for tensor in tensors])


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Puts rows [L, ...] together, filled up with zeros to the longest."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
