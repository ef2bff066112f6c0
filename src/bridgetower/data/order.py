"""The order of training: of the examples in each epoch, and of the micro-batches of each process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Sampler

from bridgetower.data.batch import BatchKey, derive_seed


class Shuffled:
    """All examples in an order that only seed and epoch decide."""

    def __init__(self, num_examples: int, seed: int) -> None:
        self.num_examples, self.seed = num_examples, seed

    def examples(self, epoch: int) -> Int[Tensor, " n"]:
        """Returns the numbers of all examples, in the order of an epoch."""
        return torch.randperm(self.num_examples, generator=_generator(self.seed, "epoch", epoch))


class OneSetPerBatch:
    """All examples in an order whose batches are of one set each, so that negatives in a batch are of its own set.

    What is left of each set after its last whole batch comes last, mixed.
    """

    def __init__(self, sets: Int[Tensor, " n"], batch_size: int, seed: int) -> None:
        """Plans the order.

        Args:
            sets: Number of the set of each example.
            batch_size: Of a step, over all ranks and micro-batches.
            seed: Of the order.
        """
        self.sets, self.batch_size, self.seed = sets, batch_size, seed
        self._shuffled = Shuffled(len(sets), seed)

    def examples(self, epoch: int) -> Int[Tensor, " n"]:
        """Returns the numbers of all examples, in the order of an epoch."""
        order = self._shuffled.examples(epoch)
        by_set = [order[self.sets[order] == number] for number in self.sets.unique().tolist()]
        ends = [len(own) // self.batch_size * self.batch_size for own in by_set]
        batches = torch.cat([own[:end] for own, end in zip(by_set, ends, strict=True)]).view(-1, self.batch_size)
        batches = batches[torch.randperm(len(batches), generator=_generator(self.seed, "batches", epoch))]
        rest = torch.cat([own[end:] for own, end in zip(by_set, ends, strict=True)])
        return torch.cat([batches.flatten(), rest[torch.randperm(len(rest), generator=_generator(self.seed, epoch))]])


class StepSampler(Sampler[BatchKey]):
    """The micro-batches of one rank from a given step on, in an order that only the seed decides.

    The order of each epoch is cut into global batches; ranks and micro-batches take consecutive parts, so the
    batches of an optimiser step hold the same examples for any number of ranks. What does not fill a batch is left out.
    """

    def __init__(
        self,
        num_examples: int,
        *,
        batch_size: int,
        micro_batches: int,
        steps: range,
        seed: int,
        order: Shuffled | OneSetPerBatch | None = None,
        rank: int = 0,
        world_size: int = 1,
        passes: Callable[[int], int] = lambda step: 1,
        counted: Callable[[int], bool] = lambda step: False,
    ) -> None:
        """Plans the steps.

        Args:
            num_examples: In an epoch.
            batch_size: BatchDataset of a step, over all ranks and micro-batches.
            micro_batches: Of each rank in a step.
            steps: Which ones.
            seed: Of the order, and of what is drawn for each micro-batch.
            order: Of the examples; None: `Shuffled`.
            rank, world_size: Of this process, and how many there are.
            passes: How often the micro-batches of a step come, one whole pass after the other.
            counted: Whether the first micro-batch of a step names them all, in the last pass.
        """
        parts = world_size * micro_batches
        if num_examples < batch_size:
            raise ValueError(f"{num_examples} examples are fewer than one batch of {batch_size}; lower batch_size")
        if batch_size % parts:
            raise ValueError(
                f"batch_size {batch_size} does not split into {world_size} processes x {micro_batches} micro-batches; "
                f"use a multiple of {parts}"
            )
        self.num_examples, self.batch_size, self.steps, self.seed = num_examples, batch_size, steps, seed
        self.micro_batches, self.rank, self.part = micro_batches, rank, batch_size // parts
        self.passes, self.counted = passes, counted
        self.order = order or Shuffled(num_examples, seed)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.num_examples // self.batch_size

    def __len__(self) -> int:
        return sum(self.passes(step) for step in self.steps) * self.micro_batches

    def __iter__(self) -> Iterator[BatchKey]:
        epoch, order = -1, torch.empty(0)
        for step in self.steps:
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self.order.examples(epoch)
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


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*parts))
