"""The order of training: of the examples in each epoch, and of the micro-batches of each process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Sampler

from bridgetower.data.batch import BatchKey, derive_seed


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
        sets: Int[Tensor, " n"] | None = None,
        rank: int = 0,
        world_size: int = 1,
        passes: Callable[[int], int] = lambda step: 1,
        counted: Callable[[int], bool] = lambda step: False,
    ) -> None:
        """Plans the steps; with the set of each example, `sets`, batches are of one set each.

        `passes` tells how often the micro-batches of a step come, one whole pass after the other, and `counted` whether
        the first micro-batch of a step names them all, in the last pass.
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
            return torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(self.seed, *parts, epoch)))

        order, size = shuffled(self.num_examples, "epoch"), self.batch_size
        if self.sets is None:
            return order
        by_set = [order[self.sets[order] == number] for number in self.sets.unique().tolist()]
        ends = [len(own) // size * size for own in by_set]
        batches = torch.cat([own[:end] for own, end in zip(by_set, ends, strict=True)]).view(-1, size)
        rest = torch.cat([own[end:] for own, end in zip(by_set, ends, strict=True)])
        return torch.cat([batches[shuffled(len(batches), "batches")].flatten(), rest[shuffled(len(rest))]])
