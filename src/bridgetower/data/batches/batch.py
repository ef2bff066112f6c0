"""Batches as functions of their keys, the order of the keys, and masked words."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from bridgetower.data.config import MaskingConfig
from bridgetower.model.layers import to_device


@dataclass(frozen=True)
class BatchKey:
    """Key of a micro-batch."""

    examples: tuple[int, ...]
    seed: int  # of its draws
    # All micro-batches of this process in the step, in the first one, where something is counted over a step.
    step: tuple[BatchKey, ...] = ()


class BatchDataset(Protocol):
    """A `torch.utils.data.Dataset` whose items are batches, by their keys."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: BatchKey) -> Batch: ...


def derive_seed(*values: object) -> int:
    """Returns a 63-bit seed that depends on all arguments."""
    digest = hashlib.blake2b(":".join(map(str, values)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


IGNORED = -100  # label of a position that is not predicted, as PyTorch's cross-entropy has it

# Values of padding, by field.
_PADDING = {"input_ids": 0, "masked_input_ids": 0, "attention_mask": 0, "mlm_labels": IGNORED}

_Batch = TypeVar("_Batch", bound="Batch")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples of a task, with None for fields that it does not read."""

    ids: tuple[str, ...] = ()  # names of the examples, for predictions and error messages
    seed: int = 0  # of everything that is drawn while the batch is processed
    # The image of each example, or the first of two.
    pixel_values: Float[Tensor, "b 3 h w"] | None = None
    pixel_values_2: Float[Tensor, "b 3 h w"] | None = None
    input_ids: Int[Tensor, "b l"] | None = None
    attention_mask: Int[Tensor, "b l"] | None = None  # 0 on padding; None if nothing is padded
    # Classes, numbers, or a score of each class.
    labels: Int[Tensor, " b"] | Float[Tensor, " b"] | Float[Tensor, "b k"] | None = None
    # Features of frozen towers (`frozen.py`): hidden states of layers or one vector, in place of pixels and beside ids.
    image_states: Float[Tensor, "b n p v"] | Float[Tensor, "b v"] | None = None
    image_states_2: Float[Tensor, "b n p v"] | None = None
    text_states: Float[Tensor, "b n l t"] | Float[Tensor, "b t"] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_images(self) -> int:
        has_first = self.pixel_values is not None or self.image_states is not None
        has_second = self.pixel_values_2 is not None or self.image_states_2 is not None
        return has_first + has_second

    def to(self, device: torch.device) -> Self:
        return self._map(lambda tensor: to_device(tensor, device))

    def pin_memory(self) -> Self:
        """Pins all tensors, for the data loader of PyTorch."""
        return self._map(Tensor.pin_memory)

    def copied(self) -> Self:
        return self._map(Tensor.clone)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        tensors: dict[str, Any] = {
            name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


@dataclass(frozen=True, kw_only=True)
class CaptionBatch(Batch):
    """Images with one caption each."""

    input_ids: Int[Tensor, "b l"]
    masked_input_ids: Int[Tensor, "b l"]
    mlm_labels: Int[Tensor, "b l"]  # ids of masked words, `IGNORED` elsewhere
    image_index: Int[Tensor, " b"]  # equal for images with the same captions, on all ranks
    step_labels: Int[Tensor, ""] | None = None  # labels of this process in the step, if counted
    mlm_weight: Float[Tensor, ""] | None = None  # factor of the MLM loss, None is 1
    # Positions of labels in the whole batch, found before it is on a GPU, which would have to be waited for.
    mlm_positions: Int[Tensor, " n"] | None = None
    masked_states: Float[Tensor, "b n l t"] | None = None  # features of the masked texts

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device) -> Self:
        """Moves all tensors, after the positions of labels are found."""
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

    input_ids: Int[Tensor, "t l"]  # texts of one image after the other, the true one first
    attention_mask: Int[Tensor, "t l"] | None = None
    image_index: Int[Tensor, " b"]  # equal for images with the same captions


def joined(batches: Sequence[_Batch], *, seed: int) -> _Batch:
    """Concatenates batches of one type, whose texts are padded to the longest."""
    values: dict[str, Any] = {
        "seed": seed,
        "ids": tuple(name for batch in batches for name in batch.ids),
    }
    for field, first in vars(batches[0]).items():
        if isinstance(first, Tensor):
            tensors = [getattr(batch, field) for batch in batches]
            if field in _PADDING:
                rows = [row for tensor in tensors for row in tensor.unbind()]
                values[field] = pad_sequence(rows, batch_first=True, padding_value=_PADDING[field])
            else:
                values[field] = torch.cat(tensors)
    mask = values.get("attention_mask")
    if mask is not None and bool(mask.all()):
        values["attention_mask"] = None
    return replace(batches[0], **values)


def mask_tokens(
    input_ids: Int[Tensor, "b l"],
    *,
    config: MaskingConfig,
    special_ids: Collection[int],
    mask_token_id: int,
    vocab_size: int,
    generator: torch.Generator,
    continues_word: Bool[Tensor, " v"] | None = None,
) -> tuple[Int[Tensor, "b l"], Int[Tensor, "b l"]]:
    """Returns ids with masked tokens, and their labels.

    The number of draws depends only on the shape.

    Args:
        input_ids: Tokens of texts.
        config: How much is masked, and how.
        special_ids: Tokens that are never masked.
        mask_token_id: Id of the mask token.
        vocab_size: Number of token ids.
        generator: Source of the draws.
        continues_word: For each id, whether it continues the word before it. Then whole words are masked.
    """
    is_special_id = torch.zeros(vocab_size, dtype=torch.bool)
    is_special_id[[*special_ids, mask_token_id]] = True
    is_special = is_special_id[input_ids]

    # Predicted tokens. With whole words every token has the draw of the first token of its word.
    draws = torch.rand(input_ids.shape, generator=generator)
    if continues_word is not None:
        starts_word = ~continues_word[input_ids] | is_special
        positions = torch.arange(input_ids.shape[1])
        first_token = torch.where(starts_word, positions, 0).cummax(dim=1).values
        draws = draws.gather(1, first_token)
    is_predicted = (draws < config.probability) & ~is_special

    # Their replacements: the mask token, a random token, or none.
    ordinary_ids = (~is_special_id).nonzero().squeeze(1)
    random_rows = torch.randint(len(ordinary_ids), input_ids.shape, generator=generator)
    random_ids = ordinary_ids[random_rows].to(input_ids)
    replacement_draws = torch.rand(input_ids.shape, generator=generator)
    is_masked = is_predicted & (replacement_draws < config.mask_share)
    is_replaced = is_predicted & (replacement_draws < config.mask_share + config.random_share)
    masked = torch.where(is_replaced, random_ids, input_ids).masked_fill(is_masked, mask_token_id)
    return masked, input_ids.masked_fill(~is_predicted, IGNORED)


class StepSampler(Sampler[BatchKey]):
    """Keys of the micro-batches of one rank, in an order that only the seed decides.

    The order of each epoch is cut into global batches. Ranks and micro-batches take consecutive slices of them, so that
    the batches of an optimiser step hold the same examples for any number of ranks. Examples that fill no batch are
    left out.

    Args:
        num_examples: Number of all examples.
        batch_size: Examples of a step, a multiple of the micro-batches of all ranks.
        micro_batches: Micro-batches of a rank in a step.
        steps: Steps to give keys for.
        seed: Seed of the order and of the batches.
        sets: Set of each example; then batches are of one set each.
        rank: Rank of this process.
        world_size: Number of ranks.
        passes: Number of passes over the micro-batches of a step.
        counted: Whether the first key of the last pass of a step has the keys of all its micro-batches.
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
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.micro_batches = micro_batches
        self.micro_batch_size = batch_size // (world_size * micro_batches)
        self.steps = steps
        self.seed = seed
        self.sets = sets
        self.rank = rank
        self.passes = passes
        self.counted = counted

    @property
    def steps_per_epoch(self) -> int:
        return self.num_examples // self.batch_size

    def __len__(self) -> int:
        return sum(self.passes(step) for step in self.steps) * self.micro_batches

    def __iter__(self) -> Iterator[BatchKey]:
        epoch = -1
        local_batch_size = self.micro_batch_size * self.micro_batches
        for step in self.steps:
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self.order(epoch)
            start = step % self.steps_per_epoch * self.batch_size + self.rank * local_batch_size
            local_batch = order[start : start + local_batch_size]
            keys = []
            for index, examples in enumerate(local_batch.split(self.micro_batch_size)):
                seed = derive_seed(self.seed, step, self.rank, index)
                keys.append(BatchKey(tuple(examples.tolist()), seed))
            yield from keys * (self.passes(step) - 1)
            yield replace(keys[0], step=tuple(keys)) if self.counted(step) else keys[0]
            yield from keys[1:]

    def order(self, epoch: int) -> Int[Tensor, " n"]:
        """Returns all examples in the order of an epoch.

        With `sets`, batches of one set come first, and the mixed rest last.
        """
        order = self._shuffled(self.num_examples, "epoch", epoch)
        if self.sets is None:
            return order
        batches = []
        leftovers = []
        for set_number in self.sets.unique().tolist():
            examples = order[self.sets[order] == set_number]
            num_full = len(examples) // self.batch_size * self.batch_size
            batches.append(examples[:num_full].view(-1, self.batch_size))
            leftovers.append(examples[num_full:])
        batched = torch.cat(batches)
        batched = batched[self._shuffled(len(batched), "batches", epoch)]
        remaining = torch.cat(leftovers)
        remaining = remaining[self._shuffled(len(remaining), epoch)]
        return torch.cat([batched.flatten(), remaining])

    def _shuffled(self, count: int, *values: object) -> Int[Tensor, " n"]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, *values))
        return torch.randperm(count, generator=generator)
