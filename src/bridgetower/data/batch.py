"""Batches: each is a function of the key that names it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bridgetower.data.masking import IGNORED
from bridgetower.processor.loading import CPU
from bridgetower.rows import RowFiles

_MOST_VECTORS = 2**28  # bytes that are kept of vectors of the rows of one set of files


@dataclass(frozen=True)
class BatchKey:
    """Names one micro-batch.

    Attributes:
        examples: In it.
        seed: Of its draws.
        step: All micro-batches of this process in the step, where something is counted over a step; only the first
            one has them.
    """

    examples: tuple[int, ...]
    seed: int
    step: tuple[BatchKey, ...] = ()


class BatchDataset(Protocol):
    """A set of examples, addressed by batch: a `torch.utils.data.Dataset` whose items are batches."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, key: BatchKey) -> Batch:
        """Builds the batch that `key` names, from nothing else."""
        ...


def derive_seed(*parts: object) -> int:
    """Returns an independent 63-bit seed for each distinct combination of `parts`."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


# What fills up short texts, by field.
_FILLS = {"input_ids": 0, "masked_input_ids": 0, "attention_mask": 0, "mlm_labels": IGNORED}

_Batch = TypeVar("_Batch", bound="Batch")


TOKENS = "tokens"
"""The field of files with cached features: the bridged hidden states of each token [L, K, W]."""


class CachedFeatures:
    """Hidden states of a frozen tower for some images or texts, in the place of pixel values or token ids.

    They are read by `layers` only, so that they cost nothing on the way through a data loader.
    """

    def __init__(self, files: RowFiles, rows: Sequence[int]) -> None:
        self.files, self.rows = files, tuple(rows)
        self.length = 0  # tokens that rows are filled up to at least

    def __len__(self) -> int:
        return len(self.rows)

    def layers(self, top: int = 0, *, device: torch.device = CPU) -> list[Float[Tensor, "b l w"]]:
        """Returns the hidden states of the `top` bridged layers, 0 for all; shorter rows are filled up with zeros.

        A GPU gets them out of pinned memory, in one copy that nothing waits for.
        """
        rows = [values[:, -top:] for values in self.files.read(TOKENS, self.rows)]
        longest, pinned = max(self.length, *map(len, rows)), device.type == "cuda"
        padded = torch.zeros(len(rows), longest, *rows[0].shape[1:], dtype=rows[0].dtype, pin_memory=pinned)
        for place, row in zip(padded, rows, strict=True):
            place[: len(row)] = row
        return list(padded.to(device, non_blocking=True).unbind(2))

    def vectors(self, compute: Callable[[CachedFeatures], Float[Tensor, "1 f"]]) -> Float[Tensor, "b f"]:
        """Returns a vector of each row, computed once and kept in memory if there is room.

        Args:
            compute: The vector of one row; the same function at every call with these files.
        """
        return torch.cat([self._vector(row, compute) for row in self.rows])

    def _vector(self, row: int, compute: Callable[[CachedFeatures], Tensor]) -> Tensor:
        kept = self.files.vectors
        if row in kept:
            return kept[row]
        with torch.no_grad():
            vector = compute(CachedFeatures(self.files, [row]))
        if len(kept) * vector.nbytes < _MOST_VECTORS:
            kept[row] = vector
        return vector

    def first(self, count: int) -> CachedFeatures:
        """Returns the first rows, filled up to the length of all."""
        found = CachedFeatures(self.files, self.rows[:count])
        found.length = max(map(len, self.files.read(TOKENS, self.rows)))
        return found

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

    def copied(self) -> Self:
        """Copies every tensor."""
        return self._map(Tensor.clone)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        mapped: dict[str, Any] = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **mapped)


@dataclass(frozen=True, kw_only=True)
class CaptionBatch(Batch):
    """Images with one caption each.

    Attributes:
        masked_input_ids, mlm_labels: The same texts with words hidden, and the hidden ids (-100 elsewhere).
        image_index: Equal numbers mark the same image, or images with the same captions, across all ranks.
        step_labels: Number of labels in all micro-batches of this process in the step, where they are counted.
        mlm_weight: What MLM of this batch is multiplied with; None is 1.
        mlm_positions: Where `mlm_labels` has ids, counted over the whole batch; a GPU would have to be waited for.
    """

    pixel_values: Float[Tensor, "b 3 h w"] | CachedFeatures
    input_ids: Int[Tensor, "b l"] | CachedFeatures
    masked_input_ids: Int[Tensor, "b l"] | CachedFeatures
    mlm_labels: Int[Tensor, "b l"]
    image_index: Int[Tensor, " b"]
    step_labels: Int[Tensor, ""] | None = None
    mlm_weight: Float[Tensor, ""] | None = None
    mlm_positions: Int[Tensor, " n"] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device) -> Self:
        """Moves every tensor; the positions of labels are found before."""
        if device.type == "cpu" or self.mlm_positions is not None:
            return super().to(device)
        positions = (self.mlm_labels != IGNORED).flatten().nonzero()[:, 0]
        return replace(super().to(device), mlm_positions=positions.to(device, non_blocking=True))

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
        image_index: Equal numbers mark the same image, or images with the same captions.
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
