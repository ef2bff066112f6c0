"""Example searches show what the evaluation ranked, and are chosen by rule."""

from dataclasses import replace

import pytest

from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.evaluation.retrieval import evaluate_retrieval
from bridgetower_demo.examples import (
    Direction,
    SearchExample,
    answer_examples,
    choose,
    search_examples,
    spread_evenly,
)
from bridgetower_demo.grounding import Judged, TextExample
from helpers.retrieval import cosine_table, itm_table


def of_direction(direction: Direction, examples: list[SearchExample]) -> list[SearchExample]:
    return [example for example in examples if example.direction == direction]


def test_choice():
    for ranks, count, indices in (
        ([1, 9, 1, 4, 1, 2, 1, 30], 4, [0, 6, 5, 7]),  # half hits and half misses, from near to far
        ([1, 9, 1, 4, 1, 2, 1, 30], 5, [0, 4, 6, 5, 7]),
        ([1, 1, 1, 7], 3, [0, 2, 3]),  # the other kind fills up
        ([5, 1, 7, 6], 3, [1, 0, 2]),
        ([5, 7, 6], 2, [0, 1]),
        ([1, 1, 1], 2, [0, 2]),
    ):
        assert choose(ranks, count) == indices
    assert [spread_evenly(range(10), count) for count in (4, 1, 0)] == [[0, 3, 6, 9], [5], []]
    assert spread_evenly(range(2), 3) == [0, 1]


class TestSearches:
    def test_ranks_give_the_recall_of_the_evaluation(self, words_predictor, shape_images):
        config = RetrievalConfig(candidates=len(shape_images), max_captions=1)
        result = evaluate_retrieval(words_predictor.model, shape_images, config)
        examples = search_examples(shape_images, result, config, count=len(shape_images))
        for direction in ("text_to_image", "image_to_text"):
            ranks = [example.rank for example in of_direction(direction, examples)]
            assert len(ranks) == len(shape_images)
            for k, recall in getattr(result.recalls["two_stage"], direction).items():
                assert sum(rank <= k for rank in ranks) / len(ranks) == pytest.approx(recall)

    def test_candidates_come_first_by_match_logit_then_the_rest_by_cosine(
        self, shape_images, evaluation, retrieval_config
    ):
        examples = search_examples(
            shape_images,
            evaluation,
            retrieval_config,
            count=len(shape_images),
            top=len(shape_images),
        )
        texts, _ = shape_images.texts()
        similarity = cosine_table(evaluation)
        itm = itm_table(evaluation)
        for example in of_direction("text_to_image", examples):
            text = texts.index(example.text)
            cosines = similarity[:, text]
            by_cosine = cosines.argsort(descending=True)
            candidates = by_cosine[: retrieval_config.candidates]
            candidates = candidates[itm[candidates, text].argsort(descending=True)]
            order = [*candidates.tolist(), *by_cosine[retrieval_config.candidates :].tolist()]
            assert [hit.image for hit in example.hits] == shape_images.contents(list(order))


TOLD = [
    TextExample(topic, f"{topic} {number}?", "yes")
    for number in range(4)
    for topic in ("count", "colour")
]
RIGHT = [True, False, True, False, False, False, True, True]


def test_right_and_wrong_answers_of_each_topic_about_different_images():
    answers = tuple("yes" if right else "no" for right in RIGHT)
    judged = Judged(examples=tuple(TOLD), answers=answers, groundings={})
    examples = answer_examples(judged, [bytes([number]) for number in range(len(TOLD))], count=2)
    assert [example.question for example in examples] == [
        *("count 0?", "count 1?", "count 2?"),  # two right ones, the only wrong one
        *("colour 3?", "colour 0?", "colour 1?"),
    ]
    shared = answer_examples(
        judged, [b"one", b"one", b"two", b"two", b"three", b"three", b"four", b"four"], count=1
    )
    assert len({example.image for example in shared}) == 4
    right = replace(judged, answers=("yes",) * len(TOLD))
    apart = answer_examples(right, [bytes([number]) for number in range(len(TOLD))], count=1)
    assert [example.question for example in apart] == ["count 0?", "colour 2?"]  # from half-way on
    assert [example.is_right for example in examples] == [True, True, False, True, False, False]
    assert [example.given for example in examples] == ["yes", "yes", "no", "yes", "no", "no"]
    assert {example.answer for example in examples} == {"yes"}
    texts = [fact.text for fact in TOLD]
    assert all(example.image == bytes([texts.index(example.question)]) for example in examples)
