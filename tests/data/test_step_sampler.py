"""The order in which the keys of batches come."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridgetower.data.batch import BatchKey, StepSampler, derive_seed


def keys(num_examples: int, steps: Iterable[int] = range(4), **values: Any) -> list[BatchKey]:
    options = {"batch_size": 4, "micro_batches": 1, "seed": 0} | values
    return list(StepSampler(num_examples, steps=steps, **options))  # type: ignore[arg-type]


class TestSampler:
    @given(
        num_examples=st.integers(4, 60),
        parts=st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]),
        seed=st.integers(0, 99),
    )
    def test_an_epoch_covers_each_pair_once(self, num_examples: int, parts: tuple[int, int], seed: int) -> None:
        world_size, micro_batches = parts
        options = {"micro_batches": micro_batches, "world_size": world_size, "seed": seed}
        epoch = num_examples // 4
        for steps in (range(epoch), range(epoch, 2 * epoch)):
            seen = [
                pair
                for rank in range(world_size)
                for key in keys(num_examples, steps, rank=rank, **options)
                for pair in key.examples
            ]
            assert len(seen) == len(set(seen)) == 4 * epoch
            assert set(seen) <= set(range(num_examples))

    def test_epochs_and_seeds_differ(self) -> None:
        first, second, other = keys(16), keys(16, range(4, 8)), keys(16, seed=1)
        assert len({tuple(key.examples for key in part) for part in (first, second, other)}) == 3
        assert len({key.seed for part in (first, second, other) for key in part}) == 12

    def test_ranks_and_micro_batches_share_out_the_batch_of_one_process(self) -> None:
        whole = keys(30, range(15), batch_size=8)
        shared = [keys(30, range(15), batch_size=8, micro_batches=2, rank=rank, world_size=2) for rank in range(2)]
        for step, key in enumerate(whole):
            parts = [shared[rank][2 * step + micro].examples for rank in range(2) for micro in range(2)]
            assert key.examples == tuple(pair for part in parts for pair in part)
        assert len({key.seed for part in shared for key in part}) == 60

    def test_continues_in_the_middle_of_an_epoch(self) -> None:
        assert keys(14, range(5, 9)) == keys(14, range(9))[5:]

    def test_length(self) -> None:
        sampler = StepSampler(30, batch_size=8, micro_batches=2, steps=range(3, 10), seed=0)
        assert len(sampler) == len(list(sampler)) == 14
        assert sampler.steps_per_epoch == 3

    def test_some_steps_come_twice_as_a_whole(self) -> None:
        once = keys(30, range(3), batch_size=8, micro_batches=2)
        options = {"batch_size": 8, "micro_batches": 2, "passes": lambda step: 2 if step == 1 else 1}
        assert keys(30, range(3), **options) == [*once[:2], *once[2:4], *once[2:4], *once[4:]]
        assert len(StepSampler(30, steps=range(3), seed=0, **options)) == 8

    def test_the_first_micro_batch_of_a_step_names_them_all_where_something_is_counted(self) -> None:
        options = {"batch_size": 8, "micro_batches": 2, "passes": lambda step: 2}
        plain = keys(30, range(2), **options)
        found = keys(30, range(2), counted=lambda step: step == 1, **options)
        assert not any(key.step for key in plain)
        assert [number for number, key in enumerate(found) if key.step] == [6]  # of the last pass of the second step
        assert found[6].step == tuple(plain[6:])
        assert [replace(key, step=()) for key in found] == plain

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"batch_size": 15}, "14 examples are fewer than one batch of 15; lower batch_size"),
            (
                {"micro_batches": 3},
                "batch_size 4 does not split into 1 processes x 3 micro-batches; use a multiple of 3",
            ),
            ({"world_size": 8}, "does not split into 8 processes x 1 micro-batches"),
        ],
    )
    def test_errors(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            keys(14, **values)


class TestOneSetPerBatch:
    """Eleven examples of one set and six of another, in batches of four."""

    SETS = torch.tensor([0] * 11 + [1] * 6)

    def order(self, epoch: int, seed: int = 0) -> torch.Tensor:
        return StepSampler(17, batch_size=4, micro_batches=1, steps=range(9), seed=seed, sets=self.SETS).order(epoch)

    def test_whole_batches_are_of_one_set_and_the_rest_comes_last(self) -> None:
        for epoch in range(4):
            examples = self.order(epoch)
            assert sorted(examples.tolist()) == list(range(17))
            sets = [len(set(batch.tolist())) for batch in self.SETS[examples].split(4)]
            assert sets[:3] == [1, 1, 1]
            assert sets[3:] == [2, 1]

    def test_batches_of_the_sets_take_turns_by_seed_and_epoch_alone(self) -> None:
        assert torch.equal(self.order(1), self.order(1))
        firsts = {int(self.SETS[self.order(epoch, seed)[0]]) for seed in range(3) for epoch in range(3)}
        assert firsts == {0, 1}
        turns = {tuple(self.SETS[self.order(epoch)[:12:4]].tolist()) for epoch in range(9)}
        assert turns == {(0, 0, 1), (0, 1, 0), (1, 0, 0)}
        whole = keys(17, range(9), sets=self.SETS)
        assert keys(17, range(5, 9), sets=self.SETS) == whole[5:]


class TestSeeds:
    @given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), min_size=2, max_size=20, unique=True))
    def test_distinct_parts_give_distinct_seeds(self, parts: list[tuple[int, int]]) -> None:
        seeds = [derive_seed(*part) for part in parts]
        assert len(set(seeds)) == len(parts)
        assert all(0 <= seed < 2**63 for seed in seeds)

    def test_is_the_same_on_every_machine(self) -> None:
        assert derive_seed(0, "epoch", 3) == 2196801750301329207
