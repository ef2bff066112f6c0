"""Which pairs matching sees: a negative is never a true pair, whatever the similarities say."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgetower.objectives.losses import (
    _warn_once,
    hard_pairs,
    matching_loss,
    pairs_with_negatives,
    random_pairs,
    uniform_pairs,
)

SEEDS = st.integers(0, 2**31)


@st.composite
def image_indices(draw):
    """Batches of two rows and more, with repeated images, but not of one image only."""
    index = draw(st.lists(st.integers(0, 4), min_size=2, max_size=9))
    if len(set(index)) == 1:
        index[draw(st.integers(0, len(index) - 1))] = 9
    return torch.tensor(index)


@st.composite
def similarities(draw, rows, columns, scale):
    """Random values; at the larger scales the softmax underflows nearly everywhere."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    return scale * torch.randn(rows, columns, generator=generator)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def labels_of(pairs, images, texts):
    return (images[pairs.image_rows] == texts[pairs.text_rows]).long()


class TestRandom:
    @given(index=image_indices(), seed=SEEDS)
    def test_labels_are_true_and_half_are_positive(self, index, seed):
        pairs = random_pairs(index, generator(seed))
        count = len(index)
        assert torch.equal(pairs.labels, labels_of(pairs, index, index))
        assert int(pairs.labels.sum()) == count // 2
        assert torch.equal(pairs.text_rows, torch.arange(count))
        kept = pairs.labels == 1
        assert torch.equal(pairs.image_rows[kept], pairs.text_rows[kept])

    def test_positives_and_negatives_fall_everywhere(self):
        index, source = torch.tensor([0, 0, 1, 2]), generator()
        drawn = [random_pairs(index, source) for _ in range(300)]
        positives = torch.stack([pairs.labels for pairs in drawn]).float().mean(dim=0)
        assert (positives - 0.5).abs().max() < 0.12
        negatives = torch.cat([pairs.image_rows[:1][pairs.labels[:1] == 0] for pairs in drawn])
        shares = torch.bincount(negatives, minlength=4) / len(negatives)
        assert shares[:2].tolist() == [0, 0]  # the text's own image, twice in the batch
        assert (shares[2:] - 0.5).abs().max() < 0.15


def test_uniform_negatives_fall_everywhere():
    index, source = torch.tensor([0, 0, 1, 2]), generator()
    drawn = [uniform_pairs(index, source) for _ in range(300)]
    assert all(pairs.labels.tolist() == [1] * 4 + [0] * 8 for pairs in drawn)
    for rows in ([pairs.image_rows[4] for pairs in drawn], [pairs.text_rows[8] for pairs in drawn]):
        shares = torch.bincount(torch.stack(rows), minlength=4) / len(rows)
        assert shares[:2].tolist() == [0, 0]
        assert (shares[2:] - 0.5).abs().max() < 0.15


class TestHard:
    @settings(deadline=None)
    @given(
        data=st.data(),
        index=image_indices(),
        other=st.just(torch.tensor([], dtype=torch.long)) | image_indices(),  # of other ranks
        scale=st.sampled_from([0.0, 1.0, 14.0, 1000.0, 1e6]),
        seed=SEEDS,
        first=st.booleans(),
    )
    def test_labels_are_true(self, data, index, other, scale, seed, first):
        count, start = len(index), 0 if first else len(other)
        everything = torch.cat([index, other] if first else [other, index])
        own = slice(start, start + count)
        scores = [data.draw(similarities(count, len(everything), scale)) for _ in range(2)]
        pairs = hard_pairs(*scores, index, everything, own, generator(seed))
        assert torch.equal(pairs.labels, labels_of(pairs, everything, everything))
        assert pairs.labels.tolist() == [1] * count + [0] * 2 * count
        assert torch.equal(pairs.image_rows[:count], torch.arange(own.start, own.stop))
        assert torch.equal(pairs.text_rows[count : 2 * count], torch.arange(own.start, own.stop))
        assert torch.equal(pairs.image_rows[2 * count :], torch.arange(own.start, own.stop))

    def test_own_pair_far_ahead_does_not_hide_the_order_of_the_rest(self):
        """exp(-200) is 0 in single precision, so a softmax over all columns could not tell the others apart."""
        scores = torch.tensor([[200.0, 5.0, 0.0], [0.0, 200.0, 5.0], [5.0, 0.0, 200.0]])
        source = generator()
        drawn = [hard_pairs(scores, scores, torch.arange(3), torch.arange(3), slice(0, 3), source) for _ in range(100)]
        harder = torch.stack([pairs.image_rows[3:6] for pairs in drawn]) == torch.tensor([1, 2, 0])
        assert harder.float().mean() > 0.95

    def test_texts_choose_images_and_images_choose_texts(self):
        far = 50 * torch.eye(3)
        image_to_text, text_to_image = far.roll(2, dims=1), far.roll(1, dims=1)  # the next but one, and the next
        pairs = hard_pairs(image_to_text, text_to_image, torch.arange(3), torch.arange(3), slice(0, 3), generator())
        assert pairs.image_rows.tolist() == [0, 1, 2, 1, 2, 0, 0, 1, 2]
        assert pairs.text_rows.tolist() == [0, 1, 2, 0, 1, 2, 2, 0, 1]

    def test_frequencies_follow_the_softmax_over_the_others(self):
        scores = torch.tensor([0.0, 1.0, 2.0, 9.0]).expand(4, 4)
        source, index = generator(), torch.arange(4)
        drawn = [hard_pairs(scores, scores, index, index, slice(0, 4), source) for _ in range(600)]
        texts = torch.stack([pairs.text_rows[8:] for pairs in drawn])[:, 3]  # of image 3, whose own text scores 9
        shares = torch.bincount(texts, minlength=4) / len(texts)
        torch.testing.assert_close(shares[:3], scores[0, :3].softmax(dim=0), atol=0.06, rtol=0)
        assert shares[3] == 0

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_scores_that_are_not_finite_leave_the_error_to_the_loss(self, value):
        scores, index = torch.full((3, 3), value), torch.tensor([0, 0, 1])
        pairs = hard_pairs(scores, scores, index, index, slice(0, 3), generator())
        assert torch.equal(pairs.labels, labels_of(pairs, index, index))


def pairs_of(negatives, index):
    if negatives == "hard":
        scores = torch.randn(len(index), len(index))
        return hard_pairs(scores, scores, index, index, slice(0, len(index)), generator())
    return (random_pairs if negatives == "random" else uniform_pairs)(index, generator())


@pytest.mark.parametrize("negatives", ["random", "uniform", "hard"])
class TestOneImageOnly:
    @pytest.mark.parametrize("index", [[3], [3, 3], [5, 5, 5, 5]])
    def test_all_pairs_are_true_and_nothing_is_learnt(self, negatives, index, caplog):
        _warn_once.cache_clear()
        for _ in range(2):
            pairs = pairs_of(negatives, torch.tensor(index))
            assert pairs.labels.tolist() == [1] * len(pairs.labels)
            assert max(*pairs.image_rows.tolist(), *pairs.text_rows.tolist(), 0) < len(index)
            logits = torch.randn(len(pairs.labels), 2, requires_grad=True)
            loss, accuracy = matching_loss(logits, pairs.labels)
            loss.backward()
            assert loss.item() == 0
            assert logits.grad.tolist() == [[0, 0]] * len(pairs.labels)
            assert accuracy == (logits[:, 1] > logits[:, 0]).float().mean()
        assert caplog.text.count("has no negatives") == 1

    def test_two_images_are_learnt_from(self, negatives, caplog):
        _warn_once.cache_clear()
        pairs = pairs_of(negatives, torch.tensor([3, 4]))
        logits = torch.randn(len(pairs.labels), 2)
        loss, _ = matching_loss(logits, pairs.labels)
        assert loss == F.cross_entropy(logits, pairs.labels)
        assert not caplog.records


def test_layout_of_positives_and_negatives():
    pairs = pairs_with_negatives(torch.tensor([5, 4]), torch.tensor([0, 1]), slice(2, 4))
    assert pairs.image_rows.tolist() == [2, 3, 5, 4, 2, 3]
    assert pairs.text_rows.tolist() == [2, 3, 2, 3, 0, 1]
    assert pairs.labels.tolist() == [1, 1, 0, 0, 0, 0]
