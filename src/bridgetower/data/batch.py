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

    def __len__(self) -> int: ...

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
        image_states, image_states_2: What a frozen tower made of the images, in the place of pixels: the hidden states
            of some layers.
        text_states: Likewise of the texts, beside their ids.
    """

    ids: tuple[str, ...] = ()
    seed: int = 0
    pixel_values: Float[Tensor, "b 3 h w"] | None = None
    pixel_values_2: Float[Tensor, "b 3 h w"] | None = None
    input_ids: Int[Tensor, "b l"] | None = None
    attention_mask: Int[Tensor, "b l"] | None = None
    labels: Int[Tensor, " b"] | Float[Tensor, " b"] | Float[Tensor, "b k"] | None = None
    image_states: Float[Tensor, "b n p v"] | None = None
    image_states_2: Float[Tensor, "b n p v"] | None = None
    text_states: Float[Tensor, "b n l t"] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_images(self) -> int:
        first, second = (self.pixel_values, self.image_states), (self.pixel_values_2, self.image_states_2)
        return sum(any(each is not None for each in given) for given in (first, second))

    def to(self, device: torch.device) -> Self:
        """Moves every tensor."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Copies every tensor to where a GPU reads it faster; torch's data loader calls it."""
        return self._map(Tensor.pin_memory)

    def copied(self) -> Self:
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
        masked_states: Hidden states of the texts with words hidden.
    """

    input_ids: Int[Tensor, "b l"]
    masked_input_ids: Int[Tensor, "b l"]
    mlm_labels: Int[Tensor, "b l"]
    image_index: Int[Tensor, " b"]
    step_labels: Int[Tensor, ""] | None = None
    mlm_weight: Float[Tensor, ""] | None = None
    mlm_positions: Int[Tensor, " n"] | None = None
    masked_states: Float[Tensor, "b n l t"] | None = None

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
        return (self.mlm_labels != IGNORED).sum()


@dataclass(frozen=True, kw_only=True)
class RankingBatch(Batch):
    """Images with one true and several false texts each.

    Attributes:
        input_ids: The texts of each image in succession, the true one first.
        attention_mask: Of all texts.
        image_index: Equal numbers mark the same image, or images with the same captions.
    """

    input_ids: Int[Tensor, "t l"]
    attention_mask: Int[Tensor, "t l"] | None = None
    image_index: Int[Tensor, " b"]


def joined(parts: Sequence[_Batch], *, seed: int) -> _Batch:
    """Puts batches of one kind together; texts are filled up, and the mask goes where nothing is padded."""
    values: dict[str, Any] = {"seed": seed, "ids": tuple(name for part in parts for name in part.ids)}
    for field in fields(parts[0]):
        items = [getattr(part, field.name) for part in parts]
        if isinstance(items[0], Tensor):
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
