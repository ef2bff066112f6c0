"""What can be got right without looking."""

import pytest

from bridgetower.evaluation.text_only import majority_answer, text_only_answers


def test_majority():
    assert majority_answer(["yes", "no", "yes"]) == "yes"
    assert majority_answer(["b", "a"]) == "a"
    with pytest.raises(ValueError, match="no answers"):
        majority_answer([])


def test_each_text_gets_what_it_is_answered_most():
    training = [("is it red?", "yes"), ("is it red?", "yes"), ("is it red?", "no"), ("how many?", "2")]
    assert text_only_answers(training, ["how many?", "is it red?", "where?"]) == ["2", "yes", "yes"]


def test_no_training():
    with pytest.raises(ValueError, match="no answers; expected those of the training set"):
        text_only_answers([], ["how many?"])
