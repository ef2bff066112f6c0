"""Retrieval metrics against scikit-learn and exhaustive enumeration."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import top_k_accuracy_score

from bridgetower.evaluation.metrics import (
    NON_CANDIDATE_SCORE,
    RetrievalRecalls,
    chance_recalls,
    fold_recalls,
    retrieval_recalls,
    streamed_recalls,
    topk_candidates,
    two_stage_scores,
)


def make_case(num_images=12, num_texts=30, seed=0):
    """Untied scores and shuffled text owners, every image with at least one text."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_images, num_texts, generator=generator, dtype=torch.float64)
    others = torch.randint(num_images, (num_texts - num_images,), generator=generator)
    owners = torch.cat([torch.arange(num_images), others])
    return scores, owners[torch.randperm(num_texts, generator=generator)]


def both_directions(recalls):
    return [*recalls.image_to_text.values(), *recalls.text_to_image.values()]


class TestStreamed:
    @pytest.mark.parametrize("pairs_at_once", [1, 40, 1000])
    @pytest.mark.parametrize("levels", [3, 10**6])
    def test_as_with_all_scores(self, levels, pairs_at_once):
        """Also where scores are tied, and where images share texts."""
        for seed in range(5):
            scores, index = make_case(seed=seed)
            scores = (scores * levels).floor().float()
            owners = torch.arange(len(scores))
            owners[3] = owners[7] = 1
            for shared in (None, owners):
                found = streamed_recalls(
                    lambda block, scores=scores: scores[:, block],
                    len(scores),
                    index,
                    owners=shared,
                    pairs_at_once=pairs_at_once,
                )
                assert found == retrieval_recalls(scores, index, owners=shared)

    def test_errors(self):
        scores, index = make_case()
        for block, message in ((scores * torch.nan, "scores are NaN"), (scores, "images have no text")):
            given = index if "NaN" in message else torch.zeros_like(index)
            with pytest.raises(ValueError, match=message):
                streamed_recalls(lambda at, block=block: block[:, at], len(scores), given)


class TestAgainstOthers:
    @pytest.mark.parametrize("seed", range(3))
    def test_scikit_learn(self, seed):
        scores, owners = make_case(seed=seed)
        images = torch.arange(len(scores))
        own_best = torch.where(owners[None] == images[:, None], scores, -1).argmax(dim=1)  # the text that counts
        others = torch.where(owners[None] == images[:, None], -1, scores).scatter(
            1, own_best[:, None], scores.gather(1, own_best[:, None])
        )
        recalls = retrieval_recalls(scores, owners)
        for k in (1, 5, 10):
            by_image = top_k_accuracy_score(own_best, others, k=k, labels=range(len(owners)))
            by_text = top_k_accuracy_score(owners, scores.T, k=k, labels=images)
            assert recalls.image_to_text[k] == pytest.approx(by_image, abs=1e-12)
            assert recalls.text_to_image[k] == pytest.approx(by_text, abs=1e-12)

    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def test_exhaustive_enumeration(self, data):
        num_images = data.draw(st.integers(1, 3))
        extra = data.draw(st.lists(st.integers(0, num_images - 1), max_size=5 - num_images))
        owners = data.draw(st.permutations([*range(num_images), *extra]))
        levels = st.sampled_from([NON_CANDIDATE_SCORE, -1.0, 0.0, 0.5])
        row = st.lists(levels, min_size=len(owners), max_size=len(owners))
        scores = data.draw(st.lists(row, min_size=num_images, max_size=num_images))
        k = data.draw(st.integers(1, 6))
        recalls = retrieval_recalls(torch.tensor(scores), torch.tensor(owners), ks=(k,))
        image_queries = [(scores[i], {t for t, owner in enumerate(owners) if owner == i}) for i in range(num_images)]
        text_queries = [([scores[i][t] for i in range(num_images)], {owner}) for t, owner in enumerate(owners)]
        assert recalls.image_to_text[k] == pytest.approx(mean_hit(image_queries, k), abs=1e-12)
        assert recalls.text_to_image[k] == pytest.approx(mean_hit(text_queries, k), abs=1e-12)


def mean_hit(queries, k):
    """Share of hits over all orders of the items that respect the scores, averaged over queries."""
    return sum(hit_share(values, own, k) for values, own in queries) / len(queries)


def hit_share(values, own, k):
    orders = [
        order
        for order in itertools.permutations(range(len(values)))
        if all(values[a] >= values[b] for a, b in itertools.pairwise(order))
    ]
    findable = {item for item in own if values[item] != NON_CANDIDATE_SCORE}
    return sum(bool(findable & set(order[:k])) for order in orders) / len(orders)


class TestRetrievalRecalls:
    def test_by_hand(self):
        scores = torch.tensor([[0.9, 0.1, 0.5, 0.2], [0.8, 0.3, 0.1, 0.4]])
        recalls = retrieval_recalls(scores, torch.tensor([0, 0, 1, 1]), ks=(1, 2))
        assert recalls.image_to_text == {1: 0.5, 2: 1.0}
        assert recalls.text_to_image == {1: 0.5, 2: 1.0}
        assert recalls.rsum == 300.0
        assert recalls.to_dict() == {
            "image_to_text_r1": 0.5,
            "image_to_text_r2": 1.0,
            "text_to_image_r1": 0.5,
            "text_to_image_r2": 1.0,
            "rsum": 300.0,
            "num_images": 2,
            "num_texts": 4,
            "num_folds": 1,
        }

    def test_perfect_scores(self):
        _, owners = make_case()
        scores = torch.nn.functional.one_hot(owners).T.double()
        recalls = retrieval_recalls(scores, owners)
        assert both_directions(recalls) == [1.0] * 6
        assert recalls.rsum == 600.0
        assert retrieval_recalls(-scores, owners, ks=(1,)).rsum == 0.0

    @pytest.mark.parametrize("constant", [0.0, -1e30, 7.0])
    def test_constant_scores_are_worth_chance(self, constant):
        scores, owners = make_case()
        ks = (1, 5, 10, 11)
        recalls = retrieval_recalls(torch.full_like(scores, constant), owners, ks=ks)
        chance = chance_recalls(owners, len(scores), ks=ks)
        assert both_directions(recalls) == pytest.approx(both_directions(chance), abs=1e-12)
        assert max(both_directions(recalls)) < 1.0

    def test_order_of_rows_does_not_matter_even_with_ties(self):
        scores, owners = make_case()
        scores = (scores * 4).round()
        generator = torch.Generator().manual_seed(9)
        images, texts = (torch.randperm(size, generator=generator) for size in scores.shape)
        new_row = images.argsort()
        expected = retrieval_recalls(scores, owners)
        permuted = retrieval_recalls(scores[images][:, texts], new_row[owners[texts]])
        assert both_directions(permuted) == pytest.approx(both_directions(expected), abs=1e-12)

    def test_monotone_in_k(self):
        scores, owners = make_case()
        recalls = retrieval_recalls((scores * 5).round(), owners, ks=range(1, 31))
        for direction in (recalls.image_to_text, recalls.text_to_image):
            values = list(direction.values())
            assert values == sorted(values)
            assert values[-1] == 1.0
            assert values[0] < 1.0

    def test_duplicate_captions_stay(self):
        """A repeated caption of another image stands beside the own one and takes half of its chance."""
        scores = torch.tensor([[0.9, 0.9], [0.2, 0.2]])
        recalls = retrieval_recalls(scores, torch.tensor([0, 1]), ks=(1, 2))
        assert recalls.image_to_text == {1: 0.5, 2: 1.0}
        assert recalls.text_to_image == {1: 0.5, 2: 1.0}
        assert recalls.num_texts == 2
        same_image = retrieval_recalls(torch.tensor([[0.9, 0.9, 0.1], [0.2, 0.2, 0.3]]), torch.tensor([0, 0, 1]))
        assert same_image.image_to_text[1] == 1.0
        assert same_image.num_texts == 3

    def test_directions_can_have_their_own_scores(self):
        scores, owners = make_case(seed=1)
        other, _ = make_case(seed=2)
        both = retrieval_recalls(scores, owners, text_to_image_scores=other)
        assert both.image_to_text == retrieval_recalls(scores, owners).image_to_text
        assert both.text_to_image == retrieval_recalls(other, owners).text_to_image
        assert both.text_to_image != retrieval_recalls(scores, owners).text_to_image

    def test_half_precision_and_rank_beyond_the_items(self):
        scores, owners = make_case()
        assert both_directions(retrieval_recalls(scores.bfloat16(), owners, ks=(1000,))) == [1.0, 1.0]

    def test_nan_is_an_error_that_counts(self):
        scores, owners = make_case()
        broken = scores.clone()
        broken[0, :3] = torch.nan
        with pytest.raises(ValueError, match=r"^3 of 360 scores are NaN"):
            retrieval_recalls(broken, owners)
        with pytest.raises(ValueError, match="3 of 360"):
            retrieval_recalls(scores, owners, text_to_image_scores=broken)

    @pytest.mark.parametrize(
        ("index", "message"),
        [
            ([0, 1, 1, 3], "from 0 to 3"),
            ([0, -1, 1, 2], "from -1 to 2"),
            ([0, 0, 1, 1], "1 of 3 images have no text"),
            ([0, 1, 2], "for 3 texts"),
        ],
    )
    def test_index_that_does_not_fit(self, index, message):
        with pytest.raises(ValueError, match=message):
            retrieval_recalls(torch.zeros(3, 4), torch.tensor(index))

    def test_other_errors(self):
        index = torch.tensor([0, 1])
        with pytest.raises(ValueError, match="ranks from 1"):
            retrieval_recalls(torch.zeros(2, 2), index, ks=(0, 1))
        with pytest.raises(ValueError, match="text_to_image_scores is"):
            retrieval_recalls(torch.zeros(2, 2), index, text_to_image_scores=torch.zeros(3, 2))
        with pytest.raises(ValueError, match="no texts"):
            chance_recalls(torch.tensor([], dtype=torch.long), 2)
        with pytest.raises(ValueError, match="same ranks"):
            RetrievalRecalls(image_to_text={1: 0.5}, text_to_image={5: 0.5}, num_images=2, num_texts=2)
        with pytest.raises(ValueError, match="fraction"):
            RetrievalRecalls(image_to_text={1: 50.0}, text_to_image={1: 0.5}, num_images=2, num_texts=2)


class TestSharedTexts:
    """Six images, of which 3, 4 and 5 have the captions of 0, 1 and 1."""

    OWNERS, INDEX = torch.tensor([0, 1, 2, 0, 1, 1]), torch.tensor([0, 0, 1, 2])

    def test_any_image_with_the_captions_is_right(self):
        scores = torch.zeros(6, 4)
        scores[3, 0] = scores[5, 2] = scores[2, 3] = 1.0  # texts: 0 finds image 3, 1 is tied, 2 finds 5, 3 finds 2
        recalls = retrieval_recalls(scores, self.INDEX, owners=self.OWNERS, ks=[1])
        assert recalls.text_to_image[1] == pytest.approx((1 + 2 / 6 + 1 + 1) / 4)
        tied = {0: 2 / 4, 1: 1 / 4, 4: 1 / 4}
        assert recalls.image_to_text[1] == pytest.approx((3 + sum(tied.values())) / 6)

    @pytest.mark.parametrize("ks", [(1, 5, 10), (2,), (3, 4)])
    def test_constant_scores_give_chance(self, ks):
        tied = retrieval_recalls(torch.zeros(6, 4), self.INDEX, owners=self.OWNERS, ks=ks)
        assert chance_recalls(self.INDEX, 6, owners=self.OWNERS, ks=ks) == tied

    def test_images_of_their_own_are_the_usual_case(self):
        scores, index = make_case()
        assert retrieval_recalls(scores, index, owners=torch.arange(12)) == retrieval_recalls(scores, index)
        assert chance_recalls(index, 12, owners=torch.arange(12)) == chance_recalls(index, 12)

    def test_an_owner_without_a_text(self):
        with pytest.raises(ValueError, match="2 of 6 images have no text"):
            retrieval_recalls(torch.zeros(6, 3), torch.tensor([0, 1, 1]), owners=torch.tensor([0, 1, 2, 0, 2, 1]))


class TestChance:
    def test_formula(self):
        counts = [1, 2, 5]
        owners = torch.arange(3).repeat_interleave(torch.tensor(counts))
        recalls = chance_recalls(owners, 3, ks=(1, 2, 5, 8, 20))
        for k in (1, 2, 5, 8):
            expected = sum(1 - math.comb(8 - n, k) / math.comb(8, k) for n in counts) / 3
            assert recalls.image_to_text[k] == pytest.approx(expected, abs=1e-12)
        assert recalls.image_to_text[20] == 1.0
        assert list(recalls.text_to_image.values()) == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0, 1.0])

    def test_random_scores_come_close(self):
        owners = torch.arange(20).repeat_interleave(5)
        generator = torch.Generator().manual_seed(3)
        draws = [retrieval_recalls(torch.rand(20, 100, generator=generator), owners) for _ in range(100)]
        means = torch.tensor([both_directions(draw) for draw in draws]).mean(dim=0)
        assert means.tolist() == pytest.approx(both_directions(chance_recalls(owners, 20)), abs=0.03)


class TestTwoStages:
    @pytest.mark.parametrize(("dim", "queries"), [(0, 30), (1, 12)])
    def test_every_query_gets_its_best_k(self, dim, queries):
        similarity, _ = make_case()
        mask = topk_candidates(similarity, 4, dim=dim)
        assert mask.sum(dim=dim).tolist() == [4] * queries
        worst_in = similarity.masked_fill(~mask, torch.inf).amin(dim=dim)
        best_out = similarity.masked_fill(mask, -torch.inf).amax(dim=dim)
        assert (worst_in > best_out).all()

    def test_more_candidates_than_items_are_all(self):
        similarity, _ = make_case()
        assert topk_candidates(similarity, 1000, dim=0).all()
        with pytest.raises(ValueError, match="ranks from 1"):
            topk_candidates(similarity, 0, dim=0)
        similarity[2, 3] = torch.nan
        with pytest.raises(ValueError, match="1 of 360 similarities are NaN"):
            topk_candidates(similarity, 3, dim=0)

    @pytest.mark.parametrize("protocol", ["honest", "paper"])
    def test_dropped_items_are_no_hits(self, protocol):
        """The only own item is no candidate, and all non-candidates tie: even the last rank is no hit."""
        nothing = torch.zeros(2, 2, dtype=torch.bool)
        wrong = torch.tensor([[False, True], [True, False]])
        for image_side, text_side in ((nothing, nothing), (wrong, wrong)):
            scores = two_stage_scores(torch.zeros(2, 2), image_side, text_side, protocol=protocol)
            recalls = retrieval_recalls(scores[0], torch.tensor([0, 1]), text_to_image_scores=scores[1], ks=(1, 2))
            assert both_directions(recalls) == [0.0] * 4

    def test_protocols_differ_where_only_one_side_chose(self):
        image_side = torch.tensor([[True, False], [False, False]])
        text_side = torch.tensor([[False, True], [False, False]])
        itm = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]])
        low = NON_CANDIDATE_SCORE
        honest = two_stage_scores(itm, image_side, text_side, protocol="honest")
        assert [scores.tolist() for scores in honest] == [[[1.0, low], [low, low]], [[low, 2.0], [low, low]]]
        paper = two_stage_scores(itm, image_side, text_side, protocol="paper")
        assert [scores.tolist() for scores in paper] == [[[1.0, 2.0], [low, low]]] * 2

    def test_errors(self):
        everything = torch.ones(2, 2, dtype=torch.bool)
        broken = torch.tensor([[0.0, torch.nan], [0.0, 0.0]])
        with pytest.raises(ValueError, match="1 of 4 candidate scores are NaN"):
            two_stage_scores(broken, everything, everything, protocol="honest")
        with pytest.raises(ValueError, match=r"4 candidate scores are -100\.0 or less"):
            two_stage_scores(torch.full((2, 2), -100.0), everything, everything, protocol="honest")
        with pytest.raises(ValueError, match="expected 'honest' or 'paper'"):
            two_stage_scores(torch.zeros(2, 2), everything, everything, protocol="best")
        with pytest.raises(ValueError, match="expected the same for all three"):
            two_stage_scores(torch.zeros(2, 3), everything, everything, protocol="paper")


class TestFolds:
    def test_mean_of_the_folds(self):
        scores, owners = make_case(num_images=12, num_texts=40)
        other, _ = make_case(num_images=12, num_texts=40, seed=5)
        folds = []
        for start in (0, 4, 8):
            mine = (owners >= start) & (owners < start + 4)
            rows = slice(start, start + 4)
            folds.append(
                retrieval_recalls(
                    scores[rows][:, mine], owners[mine] - start, text_to_image_scores=other[rows][:, mine]
                )
            )
        mean = torch.tensor([both_directions(fold) for fold in folds], dtype=torch.float64).mean(dim=0)
        recalls = fold_recalls(scores, owners, fold_size=4, text_to_image_scores=other)
        assert both_directions(recalls) == pytest.approx(mean.tolist(), abs=1e-12)
        assert (recalls.num_folds, recalls.num_images, recalls.num_texts) == (3, 12, 40)
        whole = retrieval_recalls(scores, owners, text_to_image_scores=other)
        assert recalls.text_to_image[1] != whole.text_to_image[1]

    def test_one_fold_is_everything(self):
        scores, owners = make_case()
        assert fold_recalls(scores, owners, fold_size=12) == retrieval_recalls(scores, owners)

    @pytest.mark.parametrize("fold_size", [0, 5, 1000])
    def test_folds_that_do_not_fit(self, fold_size):
        scores, owners = make_case()
        with pytest.raises(ValueError, match=f"folds of {fold_size}"):
            fold_recalls(scores, owners, fold_size=fold_size)
