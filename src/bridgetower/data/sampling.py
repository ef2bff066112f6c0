"""The order of training examples: every batch is a pure function of the seed and its number."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch.utils.data import Sampler

from bridgetower.data.batch import Batch


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


class StepSampler(Sampler[BatchKey]):
    """The micro-batches of one rank from a given step on, in an order that only the seed decides.

    Each epoch is a fresh permutation, cut into global batches; ranks and micro-batches take consecutive parts, so the
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
            rank, world_size: Of this process, and how many there are.
            passes: How often the micro-batches of a step come, one whole pass after the other.
            counted: Whether the first micro-batch of a step names them all, in the last pass.

        Raises:
            ValueError: There are fewer examples than one batch, or the batch does not split evenly.
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
                order = torch.randperm(self.num_examples, generator=_generator(self.seed, "epoch", epoch))
            start = step % self.steps_per_epoch * self.batch_size + self.rank * self.part * self.micro_batches
            own = order[start : start + self.part * self.micro_batches].split(self.part)
            keys = [
                BatchKey(tuple(examples.tolist()), derive_seed(self.seed, step, self.rank, micro))
                for micro, examples in enumerate(own)
            ]
            yield from keys * (self.passes(step) - 1)
            yield replace(keys[0], step=tuple(keys)) if self.counted(step) else keys[0]
            yield from keys[1:]


def derive_seed(*parts: object) -> int:
    """Returns an independent 63-bit seed for each distinct combination of `parts`."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*parts))
