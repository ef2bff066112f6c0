"""Token masking: shares, special tokens, labels, determinism, whole words."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgetower.data.batch import IGNORED, mask_tokens
from bridgetower.data.config import MaskingConfig

BOS, PAD, EOS, MASK = 0, 1, 2, 119
SPECIAL = (BOS, PAD, EOS)
VOCAB = 120


def make_ids(num_rows, length, seed=0):
    """Rows of ordinary tokens between start and end, the second half of the rows padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, MASK, (num_rows, length), generator=generator)
    ids[:, 0], ids[:, -1] = BOS, EOS
    ids[num_rows // 2 :, length - length // 3 :] = PAD
    return ids


def mask(ids, seed=0, **changes):
    arguments = {
        "config": MaskingConfig(),
        "special_ids": SPECIAL,
        "mask_token_id": MASK,
        "vocab_size": VOCAB,
        "generator": torch.Generator().manual_seed(seed),
    }
    return mask_tokens(ids, **(arguments | changes))


def assert_share(hits, total, expected):
    """Within five standard deviations of a binomial with `total` draws."""
    deviation = math.sqrt(expected * (1 - expected) / total)
    assert abs(hits / total - expected) < 5 * deviation


@pytest.mark.parametrize(
    "config", [MaskingConfig(), MaskingConfig(probability=0.3, mask_share=0.5, random_share=0.4)], ids=["bert", "other"]
)
def test_shares(config):
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


def test_random_tokens_cover_the_ordinary_vocabulary_evenly():
    ids = make_ids(2000, 50)
    masked, _ = mask(ids, config=MaskingConfig(probability=1.0, mask_share=0.0, random_share=1.0))
    ordinary = ~torch.isin(ids, torch.tensor(SPECIAL))
    counts = torch.bincount(masked[ordinary], minlength=VOCAB)
    assert counts[[*SPECIAL, MASK]].tolist() == [0, 0, 0, 0]
    for count in counts[3:MASK].tolist():
        assert_share(count, int(ordinary.sum()), 1 / 116)


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(0, 6),
    length=st.integers(1, 20),
    probability=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**31),
)
def test_what_always_holds(num_rows, length, probability, seed):
    ids = torch.randint(VOCAB, (num_rows, length), generator=torch.Generator().manual_seed(seed))
    before = ids.clone()
    config = MaskingConfig(probability=probability)
    masked, labels = mask(ids, seed, config=config)
    predicted = labels != IGNORED
    special = torch.isin(ids, torch.tensor([*SPECIAL, MASK]))
    assert torch.equal(ids, before)
    assert masked.dtype == labels.dtype == ids.dtype
    assert masked.shape == labels.shape == ids.shape
    assert torch.equal(labels[predicted], ids[predicted])
    assert torch.equal(masked[~predicted], ids[~predicted])
    assert not (predicted & special).any()
    assert not torch.isin(masked[predicted], torch.tensor(SPECIAL)).any()


def test_equal_generator_state_gives_equal_result():
    ids = make_ids(16, 30)
    first, again, other = mask(ids, 4), mask(ids, 4), mask(ids, 5)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_generator_moves_on_and_nothing_else_does():
    ids = make_ids(16, 30)
    generator = torch.Generator().manual_seed(0)
    global_state = torch.get_rng_state()
    first, second = mask(ids, generator=generator), mask(ids, generator=generator)
    assert not torch.equal(first[1], second[1])
    assert torch.equal(torch.get_rng_state(), global_state)


def test_the_mask_token_is_special_by_itself():
    ids = torch.full((4, 8), MASK)
    masked, labels = mask(ids, config=MaskingConfig(probability=1.0))
    assert torch.equal(masked, ids)
    assert labels.eq(IGNORED).all()


class TestWholeWords:
    CONTINUES = torch.arange(VOCAB) >= 60

    def words_of(self, row):
        """Position lists of the words of one row; special tokens end a word."""
        words, open_word = [], False
        for position, token in enumerate(row):
            if token in (*SPECIAL, MASK):
                open_word = False
            elif open_word and token >= 60:
                words[-1].append(position)
            else:
                words.append([position])
                open_word = True
        return words

    def test_words_are_predicted_whole(self):
        ids = make_ids(200, 30)
        config = MaskingConfig(whole_word=True)
        masked, labels = mask(ids, config=config, continues_word=self.CONTINUES)
        predicted = labels != IGNORED
        chosen = [predicted[row, word] for row, tokens in enumerate(ids.tolist()) for word in self.words_of(tokens)]
        assert all(word.all() or not word.any() for word in chosen)
        assert any(len(word) > 1 and word.all() for word in chosen)
        assert_share(sum(bool(word.all()) for word in chosen), len(chosen), config.probability)
        assert_share(int((masked == MASK).sum()), int(predicted.sum()), config.mask_share)

    def test_token_masking_splits_words(self):
        ids = make_ids(200, 30)
        predicted = mask(ids)[1] != IGNORED
        chosen = [predicted[row, word] for row, tokens in enumerate(ids.tolist()) for word in self.words_of(tokens)]
        assert any(word.any() and not word.all() for word in chosen)


@pytest.mark.parametrize(
    "values",
    [
        {"probability": 0.0},
        {"probability": 1.5},
        {"mask_share": -0.1},
        {"random_share": -0.1},
        {"mask_share": 0.9, "random_share": 0.2},
    ],
)
def test_config_refuses(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        MaskingConfig(**values)
