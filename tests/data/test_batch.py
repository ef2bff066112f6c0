"""Batches: put together, with hidden words, and the order in which their keys come."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgetower.data.batches.batch import (
    IGNORED,
    Batch,
    RankingBatch,
    StepSampler,
    derive_seed,
    joined,
    mask_tokens,
)
from bridgetower.data.config import MaskingConfig
from helpers.models import random_caption_batch, random_images, random_texts

BOS = 0
PAD = 1
EOS = 2
MASK = 119
SPECIAL = (BOS, PAD, EOS)
VOCAB = 120


class TestJoined:
    def test_captions_are_filled_up_to_the_longest(self):
        batches = [
            random_caption_batch((0, 1), (3, 3), seed=1),
            random_caption_batch((2,), (5,), seed=2),
        ]
        whole = joined(batches, seed=9)
        assert (whole.seed, whole.ids, len(whole)) == (9, ("0", "1", "2"), 3)
        assert torch.equal(whole.pixel_values, torch.cat([batch.pixel_values for batch in batches]))
        assert whole.attention_mask.sum(dim=1).tolist() == [3, 3, 5]
        assert torch.equal(whole.input_ids[:2, :3], batches[0].input_ids)
        assert whole.mlm_labels[0, 3:].tolist() == [IGNORED] * 2
        assert whole.image_index.tolist() == [0, 1, 2]
        assert (
            joined([random_caption_batch((n,), (4,)) for n in (0, 1)], seed=0).attention_mask
            is None
        )

    def test_several_texts_of_an_image_stay_together(self):
        batches = []
        for number, lengths in enumerate([(2, 4), (6, 3)]):
            ids, mask = random_texts(lengths, seed=number)
            index = torch.tensor([number])
            batches.append(
                RankingBatch(ids=("x",), input_ids=ids, attention_mask=mask, image_index=index)
            )
        whole = joined(batches, seed=0)
        assert whole.attention_mask.sum(dim=1).tolist() == [2, 4, 6, 3]

    def test_what_is_not_known_stays_unknown(self):
        ids, mask = random_texts((3,))
        single = Batch(
            pixel_values=random_images(1), input_ids=ids, attention_mask=mask, ids=("a",)
        )
        assert joined([single, replace(single, ids=("b",))], seed=0).labels is None
        labelled = replace(single, labels=torch.tensor([[0.5, 1.0]]))
        assert joined([labelled, labelled], seed=0).labels.tolist() == [[0.5, 1.0]] * 2


def make_ids(num_rows, length):
    """Rows of ordinary tokens between start and end, the second half of the rows padded."""
    ids = torch.randint(3, MASK, (num_rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = BOS
    ids[:, -1] = EOS
    ids[num_rows // 2 :, length - length // 3 :] = PAD
    return ids


def mask(ids, seed=0, **changes):
    arguments = {
        "config": MaskingConfig(),
        "generator": torch.Generator().manual_seed(seed),
    } | changes
    return mask_tokens(ids, special_ids=SPECIAL, mask_token_id=MASK, vocab_size=VOCAB, **arguments)


def assert_share(hits, total, expected):
    """Within five standard deviations of a binomial with `total` draws."""
    deviation = math.sqrt(expected * (1 - expected) / total)
    assert abs(hits / total - expected) < 5 * deviation


class TestMasking:
    @pytest.mark.parametrize(
        "config",
        [MaskingConfig(), MaskingConfig(probability=0.3, mask_share=0.5, random_share=0.4)],
    )
    def test_shares(self, config):
        ids = make_ids(2000, 50)
        masked, labels = mask(ids, config=config)
        predicted = labels != IGNORED
        ordinary = ~torch.isin(ids, torch.tensor(SPECIAL))
        num_predicted = int(predicted.sum())
        assert_share(num_predicted, int(ordinary.sum()), config.probability)
        assert_share(int((masked == MASK).sum()), num_predicted, config.mask_share)
        # One in 116 random tokens is the original by chance.
        exchanged = int((predicted & (masked != MASK) & (masked != ids)).sum())
        assert_share(exchanged, num_predicted, config.random_share * 115 / 116)

    def test_random_tokens_cover_the_ordinary_vocabulary_evenly(self):
        ids = make_ids(2000, 50)
        masked, _ = mask(
            ids, config=MaskingConfig(probability=1.0, mask_share=0.0, random_share=1.0)
        )
        ordinary = ~torch.isin(ids, torch.tensor(SPECIAL))
        counts = torch.bincount(masked[ordinary], minlength=VOCAB)
        assert counts[[*SPECIAL, MASK]].tolist() == [0, 0, 0, 0]
        for count in counts[3:MASK].tolist():
            assert_share(count, int(ordinary.sum()), 1 / 116)

    @settings(max_examples=60, deadline=None)
    @given(
        rows=st.integers(0, 6),
        length=st.integers(1, 20),
        probability=st.floats(0.01, 1),
        seed=st.integers(0, 999),
    )
    def test_what_always_holds(self, rows, length, probability, seed):
        ids = torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
        before = ids.clone()
        masked, labels = mask(ids, seed, config=MaskingConfig(probability=probability))
        predicted = labels != IGNORED
        special = torch.isin(ids, torch.tensor([*SPECIAL, MASK]))
        assert torch.equal(ids, before)
        assert masked.dtype == labels.dtype == ids.dtype
        assert masked.shape == labels.shape == ids.shape
        assert torch.equal(labels[predicted], ids[predicted])
        assert torch.equal(masked[~predicted], ids[~predicted])
        assert not (predicted & special).any()
        assert not torch.isin(masked[predicted], torch.tensor(SPECIAL)).any()

    def test_only_the_generator_decides_and_moves_on(self):
        ids = make_ids(16, 30)
        generator = torch.Generator().manual_seed(4)
        before = torch.get_rng_state()
        first = mask(ids, generator=generator)
        again = mask(ids, generator=generator)
        assert all(map(torch.equal, first, mask(ids, 4)))
        assert not torch.equal(first[1], again[1])
        assert torch.equal(torch.get_rng_state(), before)

    def test_words_are_predicted_whole(self):
        ids = make_ids(200, 30)
        config = MaskingConfig(whole_word=True)
        masked, labels = mask(ids, config=config, continues_word=torch.arange(VOCAB) >= 60)
        special = torch.isin(ids, torch.tensor([*SPECIAL, MASK]))  # one ends a word
        carries_on = torch.zeros_like(special)
        carries_on[:, 1:] = (ids[:, 1:] >= 60) & ~special[:, :-1] & ~special[:, 1:]
        predicted = labels != IGNORED
        by_token = mask(ids)[1] != IGNORED
        torn = [
            ((selection[:, 1:] != selection[:, :-1]) & carries_on[:, 1:]).sum()
            for selection in (predicted, by_token)
        ]
        assert torn[0] == 0 < torn[1]
        assert (predicted & carries_on).any()
        words = predicted[~special & ~carries_on]
        assert_share(int(words.sum()), len(words), config.probability)
        assert_share(int((masked == MASK).sum()), int(predicted.sum()), config.mask_share)


def keys(num_examples, steps=range(4), **values):
    options = {"batch_size": 4, "micro_batches": 1, "seed": 0} | values
    return list(StepSampler(num_examples, steps=steps, **options))


class TestSampler:
    @given(
        count=st.integers(4, 60),
        num_micro_batches=st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]),
        seed=st.integers(0, 99),
    )
    def test_an_epoch_covers_each_pair_once(self, count, num_micro_batches, seed):
        world_size, micro_batches = num_micro_batches
        options = {"micro_batches": micro_batches, "world_size": world_size, "seed": seed}
        epoch = count // 4
        for steps in (range(epoch), range(epoch, 2 * epoch)):
            keys_of_ranks = (keys(count, steps, rank=rank, **options) for rank in range(world_size))
            seen = [
                pair for rank_keys in keys_of_ranks for key in rank_keys for pair in key.examples
            ]
            assert len(seen) == len(set(seen)) == 4 * epoch
            assert set(seen) <= set(range(count))

    def test_epochs_and_seeds_differ(self):
        first = keys(16)
        second = keys(16, range(4, 8))
        other = keys(16, seed=1)
        assert (
            len(
                {tuple(key.examples for key in epoch_keys) for epoch_keys in (first, second, other)}
            )
            == 3
        )
        assert len({key.seed for epoch_keys in (first, second, other) for key in epoch_keys}) == 12

    def test_ranks_and_micro_batches_share_out_the_batch_of_one_process(self):
        whole = keys(30, range(15), batch_size=8)
        shared = [
            keys(30, range(15), batch_size=8, micro_batches=2, rank=rank, world_size=2)
            for rank in range(2)
        ]
        for step, key in enumerate(whole):
            pieces = [
                shared[rank][2 * step + micro].examples for rank in range(2) for micro in range(2)
            ]
            assert key.examples == tuple(pair for piece in pieces for pair in piece)
        assert len({key.seed for piece in shared for key in piece}) == 60

    def test_continues_in_the_middle_of_an_epoch(self):
        assert keys(14, range(5, 9)) == keys(14, range(9))[5:]

    def test_some_steps_come_twice_as_a_whole(self):
        once = keys(30, range(3), batch_size=8, micro_batches=2)
        options = {
            "batch_size": 8,
            "micro_batches": 2,
            "passes": lambda step: 2 if step == 1 else 1,
        }
        assert keys(30, range(3), **options) == [*once[:2], *once[2:4], *once[2:4], *once[4:]]
        sampler = StepSampler(30, steps=range(3), seed=0, **options)
        assert (len(sampler), sampler.steps_per_epoch) == (8, 3)

    def test_the_first_micro_batch_of_a_step_names_them_all_where_something_is_counted(self):
        options = {"batch_size": 8, "micro_batches": 2, "passes": lambda step: 2}
        plain = keys(30, range(2), **options)
        counted_keys = keys(30, range(2), counted=lambda step: step == 1, **options)
        assert not any(key.step for key in plain)
        # of the last pass of the second step
        assert [number for number, key in enumerate(counted_keys) if key.step] == [6]
        assert counted_keys[6].step == tuple(plain[6:])
        assert [replace(key, step=()) for key in counted_keys] == plain


class TestOneSetPerBatch:
    """Eleven examples of one set and six of another, in batches of four."""

    SETS = torch.tensor([0] * 11 + [1] * 6)

    def order(self, epoch, seed=0):
        return StepSampler(
            17, batch_size=4, micro_batches=1, steps=range(9), seed=seed, sets=self.SETS
        ).order(epoch)

    def test_whole_batches_are_of_one_set_and_the_rest_comes_last(self):
        for epoch in range(4):
            examples = self.order(epoch)
            assert sorted(examples.tolist()) == list(range(17))
            sets = [len(set(batch.tolist())) for batch in self.SETS[examples].split(4)]
            assert sets == [1, 1, 1, 2, 1]

    def test_batches_of_the_sets_take_turns_by_seed_and_epoch_alone(self):
        assert torch.equal(self.order(1), self.order(1))
        firsts = {
            int(self.SETS[self.order(epoch, seed)[0]]) for seed in range(3) for epoch in range(3)
        }
        assert firsts == {0, 1}
        turns = {tuple(self.SETS[self.order(epoch)[:12:4]].tolist()) for epoch in range(9)}
        assert turns == {(0, 0, 1), (0, 1, 0), (1, 0, 0)}
        assert keys(17, range(5, 9), sets=self.SETS) == keys(17, range(9), sets=self.SETS)[5:]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), min_size=2, max_size=20, unique=True)
)
def test_distinct_parts_give_distinct_seeds_the_same_on_every_machine(tuples):
    seeds = [derive_seed(*values) for values in tuples]
    assert len(set(seeds)) == len(tuples)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "epoch", 3) == 2196801750301329207
