"""VQA answers: the official normal form with its quirks, scores, and the vocabulary in official order."""

import pytest

from bridgetower.data.sets.answers import (
    ANNOTATORS,
    answer_vocabulary,
    normalise_answer,
    read_vocabulary,
    soft_targets,
    vocabulary_file,
)
from bridgetower.files import write_json


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The U.S. Open", "us open"),
        ("two-way", "2 way"),
        ("1,000", "1000"),
        ("1,000-1,200", "10001200"),
        ("no.1", "no.1"),
        ("3.", "3"),
        ("a", ""),
        ("dont know", "don't know"),
        ("yes,no", "yes no"),
        ("ten (10)", "10 10"),
        ("black & white", "black & white"),
        ("12 o clock", "12 o clock"),
        ("None", "0"),
        ("yes, no", "yes no"),  # beside a space: deleted, so no second space
        ("left- right-hand", "left righthand"),  # beside a space anywhere: deleted everywhere
        ("it's 9:30 #1", "it's 9:30 #1"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("ow's'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),  # Official: keyed with a capital, looked up in lower case
        ("shes its", "shes its"),
        ("." * 40, "." * 8),  # only 32 are removed
    ],
)
def test_normal_form_with_its_quirks(answer, expected):
    assert normalise_answer(answer) == expected


def test_a_score_is_the_rounded_mean_over_annotators_left_out():
    for count in range(11):
        num_agreeing = [count - 1] * count + [count] * (
            10 - count
        )  # how many of the other nine agree
        mean = sum(min(1.0, max(0, agreeing) / 3) for agreeing in num_agreeing) / 10
        targets = soft_targets(["net"] * count + ["no"] * (10 - count), ["net"])
        assert targets.get("net", 0.0) == round(mean, 1)


def test_targets_are_the_vocabulary_s_share_of_the_normalised_answers():
    answers = ["Two", "2", "2.", "three", "a few", "the 2", "no idea", "3", "2", "2"]
    assert soft_targets(answers, {"2", "3", "few"}) == {"2": 1.0, "3": 0.6, "few": 0.3}
    assert soft_targets(answers, {"blue"}) == {}
    assert soft_targets(["Two."], {"2"}) == {"2": 1.0}


def test_targets_of_few_annotators_are_shares():
    assert soft_targets(["two", "few"], {"2"}) == {"2": 0.5}
    assert soft_targets(["two", "2", "few"], {"2", "few"}) == pytest.approx(
        {"2": 2 / 3, "few": 1 / 3}
    )
    assert soft_targets(["two"] * 3, {"2"}) == soft_targets(["two"] * 4, {"2"}) == {"2": 1.0}
    assert soft_targets(["two", "few", "few", "no"], {"2"}) == {"2": 0.3}


def test_vocabulary_counts_normalised_answers_in_order_of_appearance():
    choices = ["net", "two", *["Yes"] * 8, "2", "no", "yes.", *["net"] * 8]
    assert answer_vocabulary(choices) == ("net", "yes")


def test_an_answer_of_the_vocabulary_is_chosen_nine_times():
    """As in the official `write_vqa.py`, which keeps the answers that come nine times or more."""
    assert answer_vocabulary(["eight"] * 8 + ["nine"] * 9 + ["ten"] * 10) == ("9", "10")
    assert ANNOTATORS == 10


def test_a_written_vocabulary_keeps_the_order(tmp_path):
    ((name, answers),) = vocabulary_file(["yes", "2", "left side", "no"]).items()
    write_json(tmp_path / name, answers)
    assert read_vocabulary(tmp_path) == ("yes", "2", "left side", "no")


@pytest.mark.parametrize("answers", [["yes", "yes"], ["Yes"], ["a dog"]])
def test_answers_that_could_not_be_compared_are_refused(answers):
    with pytest.raises(ValueError, match="give each once, in normal form"):
        vocabulary_file(answers)


@pytest.mark.parametrize("content", ["[", "{}", "[]", "[1]"])
def test_damaged_vocabulary(tmp_path, content):
    with pytest.raises(FileNotFoundError, match=r"no answers\.json in .*; give a VQA set"):
        read_vocabulary(tmp_path)
    (tmp_path / "answers.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"answers\.json is (not valid JSON .*; run|no list of answers)"
    ):
        read_vocabulary(tmp_path)
