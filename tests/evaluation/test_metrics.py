"""Retrieval metrics against scikit-learn, enumeration and whole tables, and calibration."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import top_k_accuracy_score

from bridgetower.checkpoints import Calibration, Reranking
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.evaluation.metrics import (
    BINS,
    RECALL_KS,
    Bin,
    GroundTruth,
    calibrate,
    candidate_pairs,
    chance_recalls,
    expected_calibration_error,
    folds,
    reliability,
    streamed_recalls,
)
from helpers.retrieval import (
    DROPPED,
    block_scores,
    list_pairs,
    plain_recalls,
    plain_two_stage,
    score_table,
    topk_mask,
    truth_of,
    with_scores,
)


def random_retrieval(num_images=12, num_texts=30, seed=0):
    """Untied scores and shuffled text owners, every image with at least one text."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_images, num_texts, generator=generator, dtype=torch.float64)
    repeated = torch.randint(num_images, (num_texts - num_images,), generator=generator)
    owners = torch.cat([torch.arange(num_images), repeated])
    return scores, owners[torch.randperm(num_texts, generator=generator)]


def both_directions(recalls):
    return [*recalls.image_to_text.values(), *recalls.text_to_image.values()]


def mean_of(recalls):
    """Recalls of folds, in both directions."""
    return (
        torch.tensor([both_directions(sample) for sample in recalls], dtype=torch.float64)
        .mean(dim=0)
        .tolist()
    )


def recalls_of_table(scores, index, owners=None, ks=RECALL_KS):
    """Recalls of all pairs, as candidates in a list and block by block, which are the same."""
    truth = truth_of(index, owners)
    recalls = with_scores(
        list_pairs(truth, torch.ones_like(scores, dtype=torch.bool)), scores
    ).recalls(ks=ks)
    assert streamed_recalls(block_scores(scores.float()), truth, ks=ks, pairs_at_once=40) == recalls
    return recalls


class TestStreamed:
    @pytest.mark.parametrize("pairs_at_once", [1, 40, 1000])
    @pytest.mark.parametrize("levels", [3, 10**6])
    @pytest.mark.parametrize("fold_size", [None, 4])
    def test_as_with_all_scores(self, levels, pairs_at_once, fold_size):
        """Also where scores are tied, and where images share texts."""
        for seed in range(5):
            scores, index = random_retrieval(seed=seed)
            scores = (scores * levels).floor().float()
            owners = torch.arange(len(scores))
            if fold_size is None:
                owners[3] = owners[7] = 1
            truth = GroundTruth(index, owners)
            actual = streamed_recalls(
                block_scores(scores), truth, fold_size=fold_size, pairs_at_once=pairs_at_once
            )
            expected = [
                plain_recalls(scores[rows][:, texts], scores[rows][:, texts], fold_truth)
                for rows, texts, fold_truth in folds(truth, fold_size)
            ]
            assert both_directions(actual) == pytest.approx(mean_of(expected), abs=1e-12)

    def test_nan_is_an_error_that_counts(self):
        scores, index = random_retrieval()
        scores[0, :3] = torch.nan
        with pytest.raises(ValueError, match=r"^3 of 360 scores are NaN"):
            streamed_recalls(block_scores(scores), truth_of(index))


class TestAgainstOthers:
    @pytest.mark.parametrize("seed", range(3))
    def test_scikit_learn(self, seed):
        scores, owners = random_retrieval(seed=seed)
        images = torch.arange(len(scores))
        # the text that counts
        own_best = torch.where(owners[None] == images[:, None], scores, -1).argmax(dim=1)
        remaining = torch.where(owners[None] == images[:, None], -1, scores).scatter(
            1, own_best[:, None], scores.gather(1, own_best[:, None])
        )
        recalls = recalls_of_table(scores, owners)
        assert recalls.rsum == pytest.approx(sum(both_directions(recalls)))
        for k in (1, 5, 10):
            by_image = top_k_accuracy_score(own_best, remaining, k=k, labels=range(len(owners)))
            by_text = top_k_accuracy_score(owners, scores.T, k=k, labels=images)
            assert recalls.image_to_text[k] == pytest.approx(by_image, abs=1e-12)
            assert recalls.text_to_image[k] == pytest.approx(by_text, abs=1e-12)

    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def test_exhaustive_enumeration(self, data):
        num_images = data.draw(st.integers(1, 3))
        extra = data.draw(st.lists(st.integers(0, num_images - 1), max_size=5 - num_images))
        owners = data.draw(st.permutations([*range(num_images), *extra]))
        levels = st.sampled_from([DROPPED, -1.0, 0.0, 0.5])
        row = st.lists(levels, min_size=len(owners), max_size=len(owners))
        scores = data.draw(st.lists(row, min_size=num_images, max_size=num_images))
        k = data.draw(st.integers(1, 6))
        table = torch.tensor(scores)
        pairs = list_pairs(truth_of(torch.tensor(owners)), table != DROPPED)
        recalls = with_scores(pairs, table).recalls(ks=(k,))
        image_queries = [
            (scores[i], {t for t, owner in enumerate(owners) if owner == i})
            for i in range(num_images)
        ]
        text_queries = [
            ([scores[i][t] for i in range(num_images)], {owner}) for t, owner in enumerate(owners)
        ]
        assert recalls.image_to_text[k] == pytest.approx(mean_hit(image_queries, k), abs=1e-12)
        assert recalls.text_to_image[k] == pytest.approx(mean_hit(text_queries, k), abs=1e-12)


def mean_hit(queries, k):
    """Share of hits over all orders of the items that respect the scores, averaged over queries."""
    return sum(hit_share(values, targets, k) for values, targets in queries) / len(queries)


def hit_share(values, targets, k):
    orders = [
        order
        for order in itertools.permutations(range(len(values)))
        if all(values[a] >= values[b] for a, b in itertools.pairwise(order))
    ]
    findable = {item for item in targets if values[item] != DROPPED}
    return sum(bool(findable & set(order[:k])) for order in orders) / len(orders)


@pytest.mark.parametrize("constant", [0.0, -1e30, 7.0])
def test_constant_scores_are_worth_chance(constant):
    scores, owners = random_retrieval()
    ks = (1, 5, 10, 11)
    recalls = recalls_of_table(torch.full_like(scores, constant), owners, ks=ks)
    chance = chance_recalls(truth_of(owners), ks=ks)
    assert both_directions(recalls) == pytest.approx(both_directions(chance), abs=1e-12)
    assert max(both_directions(recalls)) < 1.0


def test_any_image_with_the_captions_is_right():
    # 3, 4, 5 share those of 0, 1, 1
    owners = torch.tensor([0, 1, 2, 0, 1, 1])
    index = torch.tensor([0, 0, 1, 2])
    scores = torch.zeros(6, 4)
    # texts: 0 finds image 3, 1 is tied, 2 finds 5, 3 finds 2
    scores[3, 0] = scores[5, 2] = scores[2, 3] = 1.0
    recalls = recalls_of_table(scores, index, owners=owners, ks=[1])
    assert recalls.text_to_image[1] == pytest.approx((1 + 2 / 6 + 1 + 1) / 4)
    tied = {0: 2 / 4, 1: 1 / 4, 4: 1 / 4}
    assert recalls.image_to_text[1] == pytest.approx((3 + sum(tied.values())) / 6)


def test_chance_by_formula():
    counts = [1, 2, 5]
    owners = torch.arange(3).repeat_interleave(torch.tensor(counts))
    recalls = chance_recalls(truth_of(owners), ks=(1, 2, 5, 8, 20))
    for k in (1, 2, 5, 8):
        expected = sum(1 - math.comb(8 - n, k) / math.comb(8, k) for n in counts) / 3
        assert recalls.image_to_text[k] == pytest.approx(expected, abs=1e-12)
    assert recalls.image_to_text[20] == 1.0
    assert list(recalls.text_to_image.values()) == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0, 1.0])


@st.composite
def cases(draw):
    """Cosines and scores with many ties, folds or images with the same captions."""
    fold_size = draw(st.sampled_from([None, 1, 2, 3]))
    num_images = (
        draw(st.integers(1, 7)) if fold_size is None else fold_size * draw(st.integers(1, 3))
    )
    owners = list(range(num_images))
    for image in range(num_images):
        first = draw(st.integers(0, image))
        if fold_size is None and owners[first] == first:
            owners[image] = first
    with_texts = sorted(set(owners))
    index = draw(
        st.permutations([*with_texts, *draw(st.lists(st.sampled_from(with_texts), max_size=6))])
    )
    levels = draw(st.sampled_from([1, 3, 50]))
    numbers = st.lists(
        st.integers(-levels, levels),
        min_size=num_images * len(index),
        max_size=num_images * len(index),
    )
    cosine, scores = (torch.tensor(draw(numbers)).view(num_images, -1) / levels for _ in range(2))
    return cosine, scores, GroundTruth(torch.tensor(index), torch.tensor(owners)), fold_size


class TestTwoStages:
    @settings(max_examples=75, deadline=None)
    @given(cases(), st.integers(1, 5), st.sampled_from(["standard", "paper"]), st.integers(1, 40))
    def test_as_on_whole_tables(self, case, k, protocol, pairs_at_once):
        cosine, scores, truth, fold_size = case
        config = RetrievalConfig(candidates=k, fold_size=fold_size)
        pairs = candidate_pairs(block_scores(cosine), truth, config, pairs_at_once=pairs_at_once)
        sides = torch.zeros(2, *cosine.shape, dtype=torch.bool)
        expected = []
        for rows, texts, fold_truth in folds(truth, fold_size):
            fold_cosine = cosine[rows][:, texts]
            candidates = topk_mask(fold_cosine, k, dim=1), topk_mask(fold_cosine, k, dim=0)
            sides[0][rows, texts], sides[1][rows, texts] = candidates
            expected.append(
                plain_recalls(
                    *plain_two_stage(scores[rows][:, texts], *candidates, protocol), fold_truth
                )
            )
        assert torch.equal(score_table(pairs, pairs.image_side, other=False), sides[0])
        assert torch.equal(score_table(pairs, pairs.text_side, other=False), sides[1])
        assert torch.equal(pairs.cosine, cosine[pairs.image, pairs.text])
        order = pairs.image * len(truth.text_image_index) + pairs.text
        assert bool((order.diff() > 0).all())
        recalls = with_scores(pairs, scores, protocol).recalls()
        assert both_directions(recalls) == pytest.approx(mean_of(expected), abs=1e-12)

    def test_zeros_of_both_signs_tie(self):
        cosine = torch.tensor([[-0.0, 0.0, -1.0], [0.0, -0.0, -0.0], [-1.0, 0.0, -0.0]])
        pairs = candidate_pairs(
            block_scores(cosine), truth_of(torch.arange(3)), RetrievalConfig(candidates=1)
        )
        assert pairs.image[pairs.image_side].tolist() == [0, 1, 2]
        assert pairs.text[pairs.image_side].tolist() == [0, 0, 1]
        assert pairs.image[pairs.text_side].tolist() == [0, 0, 1]
        assert pairs.text[pairs.text_side].tolist() == [0, 1, 2]

    def test_other_pairs_are_listed_and_not_ranked(self):
        cosine, index = random_retrieval()
        config = RetrievalConfig(candidates=2)
        extra_pairs = (torch.arange(12), torch.arange(12))
        pairs = candidate_pairs(
            block_scores(cosine), truth_of(index), config, extra_pairs=extra_pairs
        )
        plain = candidate_pairs(block_scores(cosine), truth_of(index), config)
        assert len(pairs.image) > len(plain.image)
        assert bool(
            score_table(pairs, torch.ones_like(pairs.image_side), other=False).diagonal().all()
        )
        assert torch.equal(pairs.cosine.isnan(), ~(pairs.image_side | pairs.text_side))
        actual, expected = (
            with_scores(table, table.cosine, "paper").recalls() for table in (pairs, plain)
        )
        assert actual == expected

    def test_scores_that_are_nan(self):
        cosine, index = random_retrieval()
        cosine[2, 3] = torch.nan
        with pytest.raises(ValueError, match="1 of 360 similarities are NaN"):
            candidate_pairs(block_scores(cosine), truth_of(index), RetrievalConfig(candidates=3))
        pairs = list_pairs(truth_of(torch.tensor([0, 1])), torch.ones(2, 2, dtype=torch.bool))
        with pytest.raises(ValueError, match="1 of 4 candidate scores are NaN"):
            with_scores(pairs, torch.tensor([0.0, torch.nan, 0.0, 0.0])).recalls()


def test_bins_by_hand():
    bins = reliability(torch.tensor([0.0, 0.05, 0.61, 1.0]), torch.tensor([0.0, 1.0, 0.5, 1.0]))
    expected = (0, 2, 0.025, 0.5), (6, 1, 0.61, 0.5), (BINS - 1, 1, 1.0, 1.0)
    assert bins == [Bin(*counts, pytest.approx(mean), share) for *counts, mean, share in expected]
    assert expected_calibration_error(bins) == pytest.approx((2 * 0.475 + 0.11 + 0) / 4)


class TestCalibrate:
    @staticmethod
    def drawn(slope, intercept):
        """Draws what log-odds mean by a known calibration."""
        generator = torch.Generator().manual_seed(0)
        log_odds = 3 * torch.randn(20_000, generator=generator)
        matching = (
            torch.rand(20_000, generator=generator) < (slope * log_odds + intercept).sigmoid()
        )
        return log_odds, matching, torch.arange(20_000) % 2 == 1

    @pytest.mark.parametrize(("slope", "intercept"), [(0.5, -2.0), (1.5, 0.5), (0.05, -3.0)])
    def test_finds_what_the_log_odds_mean(self, slope, intercept):
        log_odds, matching, halves = self.drawn(slope, intercept)
        calibration = calibrate(log_odds, matching, halves)
        assert (calibration.slope, calibration.intercept) == pytest.approx(
            (slope, intercept), abs=0.1
        )
        assert (calibration.pairs, calibration.matching) == (20_000, int(matching.sum()))
        assert calibration.ece_after < 0.02 < calibration.ece_before
        expected = (slope * log_odds + intercept).sigmoid()
        torch.testing.assert_close(
            Reranking(calibration=calibration).match(log_odds), expected, atol=0.02, rtol=0
        )

    def test_matching_that_knows_nothing_gives_the_share(self):
        # worse than nothing: large where there is no match
        log_odds, matching, halves = self.drawn(-1.0, -2.0)
        calibration = calibrate(log_odds, matching, halves)
        assert calibration.slope == 0
        share = Reranking(calibration=calibration).match(log_odds)
        assert share.tolist() == pytest.approx([float(matching.float().mean())] * 20_000)

    def test_an_error_is_not_that_of_the_fit(self):
        """What a half alone shows does not hold on the other: a fit to both would look right."""
        log_odds = torch.linspace(-3, 3, 1000)
        halves = torch.arange(1000) % 2 == 1
        matching = torch.where(halves, log_odds > 0, log_odds < 0)
        calibration = calibrate(log_odds, matching, halves)
        assert calibration.ece_after > 0.4

    @pytest.mark.parametrize("value", [True, False])
    def test_needs_both_kinds_of_pairs_in_each_half(self, *, value):
        halves = torch.tensor([True, True, False, False])
        matching = torch.tensor([True, False, value, value])
        assert calibrate(torch.zeros(4), matching, halves) is None


def test_what_is_shown():
    log_odds = torch.tensor([0.0, 3.0])
    calibration = Calibration(
        slope=0.5, intercept=-1.5, pairs=9, matching=1, ece_before=0.5, ece_after=0.1
    )
    assert Reranking().matches(log_odds) == [
        {"score": 0.5},
        {"score": pytest.approx(0.9526, abs=1e-4)},
    ]
    assert Reranking(calibration=calibration).matches(log_odds) == [
        {"probability": pytest.approx(0.1824, abs=1e-4)},
        {"probability": 0.5},
    ]
