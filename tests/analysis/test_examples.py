"""Example searches show what the evaluation ranked, and are chosen by rule."""

from dataclasses import replace

import pytest
import torch

import dense
from bridgetower.analysis.examples import Direction, SearchExample, choose, search_examples, spread_evenly
from bridgetower.data.captions import CaptionImages
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.evaluation.retrieval import RetrievalResult, evaluate_retrieval
from bridgetower.predictor import Predictor


def of(direction: Direction, examples: list[SearchExample]) -> list[SearchExample]:
    return [example for example in examples if example.direction == direction]


class TestChoice:
    def test_half_hits_and_half_misses_from_near_to_far(self) -> None:
        ranks = [1, 9, 1, 4, 1, 2, 1, 30]
        assert choose(ranks, 4) == [0, 6, 5, 7]
        assert choose(ranks, 5) == [0, 4, 6, 5, 7]

    def test_the_other_kind_fills_up(self) -> None:
        assert choose([1, 1, 1, 7], 3) == [0, 2, 3]
        assert choose([5, 1, 7, 6], 3) == [1, 0, 2]
        assert choose([5, 7, 6], 2) == [0, 1]
        assert choose([1, 1, 1], 2) == [0, 2]

    def test_no_more_than_there_are(self) -> None:
        assert choose([1, 3, 2], 10) == [0, 2, 1]

    def test_spread(self) -> None:
        assert spread_evenly(range(10), 4) == [0, 3, 6, 9]
        assert spread_evenly(range(10), 1) == [5]
        assert spread_evenly(range(10), 0) == []
        assert spread_evenly(range(2), 3) == [0, 1]


class TestSearches:
    def test_ranks_give_the_recall_of_the_evaluation(self, predictor: Predictor, images: CaptionImages) -> None:
        config = RetrievalConfig(candidates=len(images), max_captions=1)
        result = evaluate_retrieval(predictor.model, images, config)
        examples = search_examples(predictor, images, result, config, count=len(images))
        assert result.two_stage_recalls is not None
        for direction in ("text_to_image", "image_to_text"):
            ranks = [example.rank for example in of(direction, examples)]
            assert len(ranks) == len(images)
            for k, recall in getattr(result.two_stage_recalls, direction).items():
                assert sum(rank <= k for rank in ranks) / len(ranks) == pytest.approx(recall)

    def test_candidates_come_first_by_match_logit_then_the_rest_by_cosine(
        self, predictor: Predictor, images: CaptionImages, ranked: RetrievalResult, config: RetrievalConfig
    ) -> None:
        examples = search_examples(predictor, images, ranked, config, count=len(images), top=len(images))
        texts, _ = images.texts()
        similarity, itm = dense.similarity(ranked), dense.itm(ranked)
        for example in of("text_to_image", examples):
            text = texts.index(example.text)
            cosines = similarity[:, text]
            by_cosine = cosines.argsort(descending=True)
            candidates = by_cosine[: config.candidates]
            candidates = candidates[itm[candidates, text].argsort(descending=True)]
            order = [*candidates.tolist(), *by_cosine[config.candidates :].tolist()]
            assert [hit.image for hit in example.hits] == images.contents(list(order))
            assert [hit.cosine for hit in example.hits] == pytest.approx([float(cosines[image]) for image in order])

    def test_scores_are_those_of_the_pair(
        self, predictor: Predictor, images: CaptionImages, ranked: RetrievalResult, config: RetrievalConfig
    ) -> None:
        for example in search_examples(predictor, images, ranked, config, count=2):
            for hit in (*example.hits, example.own):
                pair = (
                    (hit.image, example.text) if example.direction == "text_to_image" else (example.image, hit.caption)
                )
                score = float(hit.match.removeprefix("score "))
                assert score == pytest.approx(float(predictor.match(*pair)), abs=6e-4)
                product = predictor.embed_images(pair[0]) @ predictor.embed_texts(pair[1]).T
                assert hit.cosine == pytest.approx(float(product), abs=1e-6)

    def test_own_answer_stands_at_its_rank(
        self, predictor: Predictor, images: CaptionImages, ranked: RetrievalResult, config: RetrievalConfig
    ) -> None:
        examples = search_examples(predictor, images, ranked, config, count=len(images), top=3)
        assert {example.rank > 3 for example in examples} == {True, False}
        for example in examples:
            own_places = [place for place, hit in enumerate(example.hits, start=1) if hit.is_own]
            assert own_places[:1] == ([example.rank] if example.rank <= 3 else [])
            assert example.own.is_own
            assert example.own.image == example.image
            assert example.num_items == (
                len(images) if example.direction == "text_to_image" else len(images.texts()[0])
            )

    def test_texts_found_carry_the_picture_that_they_belong_to(
        self, predictor: Predictor, images: CaptionImages, ranked: RetrievalResult, config: RetrievalConfig
    ) -> None:
        owner = {caption: image for image, captions in enumerate(images.all_captions()) for caption in captions}
        for example in of("image_to_text", search_examples(predictor, images, ranked, config, count=3)):
            assert [hit.image for hit in example.hits] == images.contents([owner[hit.caption] for hit in example.hits])

    def test_same_call_same_examples(
        self, predictor: Predictor, images: CaptionImages, ranked: RetrievalResult, config: RetrievalConfig
    ) -> None:
        first, second = (search_examples(predictor, images, ranked, config, count=4) for _ in range(2))
        assert first == second

    def test_without_matching_head_the_cosine_ranks(
        self, predictor: Predictor, images: CaptionImages, ranked: RetrievalResult, config: RetrievalConfig
    ) -> None:
        plain = replace(ranked, candidates=None, two_stage_recalls=None, itm_accuracy=None)
        for example in search_examples(predictor, images, plain, config, count=2):
            cosines = [hit.cosine for hit in example.hits]
            assert cosines == sorted(cosines, reverse=True)
            assert {hit.match for hit in example.hits} == {""}

    def test_config_of_another_evaluation_is_refused(
        self, predictor: Predictor, images: CaptionImages, ranked: RetrievalResult
    ) -> None:
        with pytest.raises(ValueError, match="give those of the evaluation"):
            search_examples(predictor, images, ranked, RetrievalConfig(max_captions=1), count=2)

    @pytest.mark.parametrize("numbers", [{"count": 0}, {"count": 1, "top": 0}])
    def test_numbers_below_one(
        self,
        predictor: Predictor,
        images: CaptionImages,
        ranked: RetrievalResult,
        config: RetrievalConfig,
        numbers: dict[str, int],
    ) -> None:
        with pytest.raises(ValueError, match="expected at least 1"):
            search_examples(predictor, images, ranked, config, **numbers)


def test_ties_keep_the_order_of_the_set(
    predictor: Predictor, images: CaptionImages, ranked: RetrievalResult, config: RetrievalConfig
) -> None:
    flat = replace(ranked, candidates=None, image_vectors=torch.zeros_like(ranked.image_vectors))
    examples = search_examples(predictor, images, flat, config, count=len(images), top=2)
    for example in of("text_to_image", examples):
        assert [hit.image for hit in example.hits] == images.contents([0, 1])
