"""Batches: each is a function of the key that names it; their order, and which words of them are hidden."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import Sampler

from bridgetower.data.config import MaskingConfig
from bridgetower.model.layers import to_device


@dataclass(frozen=True)
class BatchKey:
    """Names one micro-batch."""

    examples: tuple[int, ...]
    seed: int  # of its draws
    # Where something is counted over a step, its first micro-batch has all those of this process.
    step: tuple[BatchKey, ...] = ()


class BatchDataset(Protocol):
    """A set of examples, addressed by batch: a `torch.utils.data.Dataset` whose items are batches."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: BatchKey) -> Batch: ...


def derive_seed(*parts: object) -> int:
    """Returns an independent 63-bit seed for each distinct combination of `parts`."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


IGNORED = -100  # label of a position that is not predicted, as PyTorch's cross-entropy has it
_FILLS = {
    "input_ids": 0,
    "masked_input_ids": 0,
    "attention_mask": 0,
    "mlm_labels": IGNORED,
}  # of short texts

_Batch = TypeVar("_Batch", bound="Batch")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples of a task; what the task does not read is None."""

    ids: tuple[str, ...] = ()  # names of the examples, for predictions and error messages
    seed: int = 0  # of everything that is drawn while the batch is processed
    # the image of each example, or the first of both
    pixel_values: Float[Tensor, "b 3 h w"] | None = None
    pixel_values_2: Float[Tensor, "b 3 h w"] | None = None
    input_ids: Int[Tensor, "b l"] | None = None
    attention_mask: Int[Tensor, "b l"] | None = None  # 0 on padding; None if nothing is padded
    # Classes, numbers, or a score of each class; None where they are not known.
    labels: Int[Tensor, " b"] | Float[Tensor, " b"] | Float[Tensor, "b k"] | None = None
    # Of some layers of frozen towers, or what heads on them read: in the place of pixels, or beside the ids of texts.
    image_states: Float[Tensor, "b n p v"] | Float[Tensor, "b v"] | None = None
    image_states_2: Float[Tensor, "b n p v"] | None = None
    text_states: Float[Tensor, "b n l t"] | Float[Tensor, "b t"] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_images(self) -> int:
        first, second = (
            (self.pixel_values, self.image_states),
            (self.pixel_values_2, self.image_states_2),
        )
        return sum(any(each is not None for each in given) for given in (first, second))

    def to(self, device: torch.device) -> Self:
        return self._map(lambda tensor: to_device(tensor, device))

    def pin_memory(self) -> Self:
        return self._map(Tensor.pin_memory)  # torch's data loader calls this

    def copied(self) -> Self:
        return self._map(Tensor.clone)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        mapped: dict[str, Any] = {
            name: function(value) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **mapped)


@dataclass(frozen=True, kw_only=True)
class CaptionBatch(Batch):
    """Images with one caption each."""

    input_ids: Int[Tensor, "b l"]
    masked_input_ids: Int[Tensor, "b l"]  # the same texts with words hidden
    mlm_labels: Int[Tensor, "b l"]  # the hidden ids, `IGNORED` elsewhere
    image_index: Int[
        Tensor, " b"
    ]  # equal across all ranks for the same image, or images with the same captions
    # in all micro-batches of this process in the step, if counted
    step_labels: Int[Tensor, ""] | None = None
    # what MLM of this batch is multiplied with; None is 1
    mlm_weight: Float[Tensor, ""] | None = None
    # of labels in the whole batch; a GPU would have to be waited for
    mlm_positions: Int[Tensor, " n"] | None = None
    masked_states: Float[Tensor, "b n l t"] | None = None  # of the texts with words hidden

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device) -> Self:
        """Moves every tensor; the positions of labels are found before."""
        if device.type == "cpu" or self.mlm_positions is not None:
            return super().to(device)
        positions = (self.mlm_labels != IGNORED).flatten().nonzero()[:, 0]
        return replace(super().to(device), mlm_positions=to_device(positions, device))

    @property
    def num_labels(self) -> Int[Tensor, ""]:
        return (self.mlm_labels != IGNORED).sum()


@dataclass(frozen=True, kw_only=True)
class RankingBatch(Batch):
    """Images with one true and several false texts each."""

    input_ids: Int[Tensor, "t l"]  # the texts of each image in succession, the true one first
    attention_mask: Int[Tensor, "t l"] | None = None
    image_index: Int[Tensor, " b"]  # equal for the same image, or images with the same captions


def joined(parts: Sequence[_Batch], *, seed: int) -> _Batch:
    """Puts batches of one kind together; texts are filled up, and the mask goes where nothing is padded."""
    values: dict[str, Any] = {
        "seed": seed,
        "ids": tuple(name for part in parts for name in part.ids),
    }
    for field in fields(parts[0]):
        items = [getattr(part, field.name) for part in parts]
        if isinstance(items[0], Tensor):
            if (fill := _FILLS.get(field.name)) is not None:
                longest = max(tensor.shape[1] for tensor in items)
                items = [
                    F.pad(tensor, (0, longest - tensor.shape[1]), value=fill) for tensor in items
                ]
            values[field.name] = torch.cat(items)
    mask = values.get("attention_mask")
    if mask is not None and bool(mask.all()):
        values["attention_mask"] = None
    return replace(parts[0], **values)


def mask_tokens(
    input_ids: Int[Tensor, "b l"],
    *,
    config: MaskingConfig,
    special_ids: Collection[int],
    mask_token_id: int,
    vocab_size: int,
    generator: torch.Generator,
    continues_word: Bool[Tensor, " v"]
    | None = None,  # for whole words: whether an id carries on the word before it
) -> tuple[Int[Tensor, "b l"], Int[Tensor, "b l"]]:
    """Returns ids with some tokens hidden and their labels, `IGNORED` elsewhere; the shape tells how much is drawn."""
    special = torch.zeros(vocab_size, dtype=torch.bool)
    special[[*special_ids, mask_token_id]] = True
    is_special = special[input_ids]
    draws = torch.rand(input_ids.shape, generator=generator)
    if continues_word is not None:  # every token has the draw of its word's first token
        starts = ~continues_word[input_ids] | is_special
        first = torch.where(starts, torch.arange(input_ids.shape[1]), 0).cummax(dim=1).values
        draws = draws.gather(1, first)
    predicted = (draws < config.probability) & ~is_special

    ordinary = (~special).nonzero().squeeze(1)
    strangers = ordinary[torch.randint(len(ordinary), input_ids.shape, generator=generator)].to(
        input_ids
    )
    fate = torch.rand(input_ids.shape, generator=generator)
    hidden = predicted & (fate < config.mask_share)
    exchanged = predicted & (fate < config.mask_share + config.random_share)
    masked = torch.where(exchanged, strangers, input_ids).masked_fill(
        hidden, mask_token_id
    )  # hidden wins
    return masked, input_ids.masked_fill(~predicted, IGNORED)


class StepSampler(Sampler[BatchKey]):
    """The micro-batches of one rank from a given step on, in an order that only the seed decides.

    The order of each epoch is cut into global batches; ranks and micro-batches take consecutive parts, so the
    batches of an optimiser step hold the same examples for any number of ranks. What does not fill a batch is left out.
    With `sets`, the set of each example, batches are of one set each. `passes` tells how often the micro-batches of a
    step come, one whole pass after the other, and `counted` whether the first one names them all, in the last pass.
    """

    def __init__(
        self,
        num_examples: int,
        *,
        batch_size: int,
        micro_batches: int,
        steps: range,
        seed: int,
        sets: Int[Tensor, " n"] | None = None,
        rank: int = 0,
        world_size: int = 1,
        passes: Callable[[int], int] = lambda step: 1,
        counted: Callable[[int], bool] = lambda step: False,
    ) -> None:
        self.num_examples, self.batch_size, self.steps, self.seed = (
            num_examples,
            batch_size,
            steps,
            seed,
        )
        self.micro_batches, self.rank = micro_batches, rank
        self.part = batch_size // (world_size * micro_batches)
        self.sets, self.passes, self.counted = sets, passes, counted

    @property
    def steps_per_epoch(self) -> int:
        return self.num_examples // self.batch_size

    def __len__(self) -> int:
        return sum(self.passes(step) for step in self.steps) * self.micro_batches

    def __iter__(self) -> Iterator[BatchKey]:
        epoch, order = -1, torch.empty(0)
        for step in self.steps:
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self.order(epoch)
            first = step % self.steps_per_epoch * self.batch_size
            start = first + self.rank * self.part * self.micro_batches
            own = order[start : start + self.part * self.micro_batches].split(self.part)
            keys = [
                BatchKey(tuple(examples.tolist()), derive_seed(self.seed, step, self.rank, micro))
                for micro, examples in enumerate(own)
            ]
            yield from keys * (self.passes(step) - 1)
            yield replace(keys[0], step=tuple(keys)) if self.counted(step) else keys[0]
            yield from keys[1:]

    def order(self, epoch: int) -> Int[Tensor, " n"]:
        """Returns all examples in the order of an epoch; what fills no batch of one set comes last, mixed."""

        def shuffled(count: int, *parts: object) -> Int[Tensor, " n"]:
            return torch.randperm(
                count,
                generator=torch.Generator().manual_seed(derive_seed(self.seed, *parts, epoch)),
            )

        order, size = shuffled(self.num_examples, "epoch"), self.batch_size
        if self.sets is None:
            return order
        by_set = [order[self.sets[order] == number] for number in self.sets.unique().tolist()]
        ends = [len(own) // size * size for own in by_set]
        batches = torch.cat([own[:end] for own, end in zip(by_set, ends, strict=True)]).view(
            -1, size
        )
        rest = torch.cat([own[end:] for own, end in zip(by_set, ends, strict=True)])
        return torch.cat(
            [batches[shuffled(len(batches), "batches")].flatten(), rest[shuffled(len(rest))]]
        )
