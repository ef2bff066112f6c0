"""Metrics of classes and numbers against scikit-learn and SciPy, and VQA's score against a second implementation."""

import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from bridgetower.checkpoints import read_checkpoint
from bridgetower.data.batches.batch import BatchKey
from bridgetower.data.sets.answers import normalise_answer, soft_targets
from bridgetower.evaluation.class_metrics import (
    classification_metrics,
    pearson_correlation,
    predict_classes,
    spearman_correlation,
    vqa_score,
    vqa_scores,
)
from bridgetower.objectives.classification import task_of_head
from helpers.sets import entry_examples, write_entry_set


def test_every_example_is_predicted_in_order(answering_checkpoint, tmp_path, tiny_processor):
    statements = entry_examples(
        write_entry_set(tmp_path / "set", "snli-ve"), "snli-ve", tiny_processor
    )
    task = task_of_head(read_checkpoint(answering_checkpoint).model(), "snli_ve")
    with torch.no_grad():
        expected = torch.cat(
            [task.predict(statements[BatchKey((row,), 0)]) for row in range(len(statements))]
        )
    for batch_size in (5, 100):
        predictions = predict_classes(task, statements, batch_size=batch_size)
        assert torch.equal(predictions.classes, expected.argmax(dim=1))
        torch.testing.assert_close(
            predictions.probabilities, expected.amax(dim=1), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("step", [0.0, 0.5], ids=["distinct", "tied"])
def test_correlations(seed, step):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randn(100, generator=generator)
    predicted = labels + torch.randn(100, generator=generator)
    if step:
        labels = (labels / step).round()
        predicted = (predicted / step).round()
    expected = stats.pearsonr(predicted.double(), labels.double()).statistic
    assert pearson_correlation(predicted, labels) == pytest.approx(expected, abs=1e-12)
    expected = stats.spearmanr(predicted, labels).statistic
    assert spearman_correlation(predicted, labels) == pytest.approx(expected, abs=1e-12)
    assert spearman_correlation(predicted, torch.zeros(100)) == 0.0


def test_classes_that_all_examples_or_none_have_are_not_ranked():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(40, 4, generator=generator)
    labels = torch.rand(40, 4, generator=generator) < 0.4
    labels[:, 0] = True
    labels[:, 2] = False
    metrics = classification_metrics(probabilities, labels, multi_label=True)
    ranked = [1, 3]
    aurocs = [roc_auc_score(labels[:, index], probabilities[:, index]) for index in ranked]
    precisions = [
        average_precision_score(labels[:, index], probabilities[:, index]) for index in ranked
    ]
    assert metrics["auroc"] == pytest.approx(sum(aurocs) / 2)
    assert metrics["average_precision"] == pytest.approx(sum(precisions) / 2)


def test_one_half_is_not_above_it():
    probabilities = torch.tensor([[0.5, 0.75], [0.25, 0.5]])
    labels = torch.tensor([[False, True], [True, True]])
    assert classification_metrics(probabilities, labels, multi_label=True)["accuracy"] == 0.5


def test_top_5_is_of_more_than_five_classes():
    for num_classes, has_top5 in ((5, False), (6, True)):
        metrics = classification_metrics(
            torch.eye(num_classes), torch.eye(num_classes).bool(), multi_label=False
        )
        assert ("top5_accuracy" in metrics) == has_top5


NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
}
NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}


def second_normal_form(answer):
    """The rules again, letter by letter and without a table of contractions: those are checked where they are kept."""
    letters = []
    has_number = any(
        answer[i - 1].isdigit() and answer[i] == "," and answer[i + 1].isdigit()
        for i in range(1, len(answer) - 1)
    )
    for letter in answer:
        if letter in ';/[]"{}()=+\\_-><@`,?!':
            spaced = letter + " " in answer or " " + letter in answer
            letters.append("" if spaced or has_number else " ")
        else:
            letters.append(letter)
    text = "".join(letters)
    periods = 0
    normal = []
    for position, letter in enumerate(text):
        removable = letter == "." and not (
            position + 1 < len(text) and text[position + 1].isdigit()
        )
        if removable and periods < 32:
            periods += 1
        else:
            normal.append(letter)
    words = []
    for word in "".join(normal).lower().split():
        word = NUMBERS.get(word, word)
        if word not in ("a", "an", "the"):
            words.append(word)
    return " ".join(words)


def second_score(prediction, answers):
    """Leave-one-out as written: for each annotator, compare with the other nine."""
    clean = [re.sub(r"[\n\t]", " ", answer).strip() for answer in answers]
    predicted = re.sub(r"[\n\t]", " ", prediction).strip()
    if any(answer != clean[0] for answer in clean):
        clean = [second_normal_form(answer) for answer in clean]
        predicted = second_normal_form(predicted)
    total = 0.0
    for left_out in range(len(clean)):
        agreeing = 0
        for position, answer in enumerate(clean):
            if position != left_out and answer == predicted:
                agreeing += 1
        total += 1.0 if agreeing >= 3 else agreeing / 3
    return total / len(clean)


WORDS = [
    "yes",
    "no",
    "Yes",
    "2",
    "two",
    "ten",
    "none",
    "the dog",
    "a dog",
    "dog",
    "dogs",
    "an apple",
    "red",
    "red ",
    "Red",
    "black & white",
    "black and white",
    "u.s.",
    "U.S. flag",
    "no.1",
    "3.",
    "1,000",
    "1000",
    "two-way",
    "yes,no",
    "(left)",
    "left, right",
    "12 o'clock",
    "a",
    "",
    "t-shirt",
    "t shirt",
    "what?",
    "new\nline",
    "tab\there",
    "...",
    "one two",
    "#5",
]


def made_up(seed):
    """A prediction and ten answers that often agree with it, in one spelling or another."""
    draw = random.Random(seed)
    choices = draw.sample(WORDS, draw.randint(1, 4))
    answers = tuple(draw.choice(choices) for _ in range(10))
    return draw.choice([*choices, draw.choice(WORDS), draw.choice(choices).upper()]), answers


# No contractions among them, whose table has no second version.
PIECES = [
    " ",
    " ",
    " ",
    "  ",
    "a",
    "an",
    "the",
    "The",
    "one",
    "None",
    "ten",
    "TWO",
    "zero",
    "dog",
    "x",
    "1",
    "20",
    "3.5",
    *(mark for mark in ';/[]"{}()=+\\_-><@`,?!.:&#'),
    "1,0",
    ",",
    ".",
    ". ",
    " ,",
    "- ",
    "\u00e9",
]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=45))
def test_normal_form_of_the_second_implementation(pieces):
    answer = "".join(pieces)
    assert normalise_answer(answer) == second_normal_form(answer)


class TestScore:
    def test_second_implementation_on_many_sets(self):
        scores = [vqa_score(*made_up(seed)) for seed in range(3000)]
        assert scores == pytest.approx(
            [second_score(*made_up(seed)) for seed in range(3000)], abs=1e-12
        )
        assert {0.0, 0.3, 0.6, 0.9, 1.0} <= {round(score, 4) for score in scores}

    def test_unanimous_answers_are_compared_as_they_are(self):
        assert vqa_score("The dog", ["The dog"] * 10) == 1.0
        assert vqa_score("dog", ["The dog"] * 10) == 0.0
        assert vqa_score("dog", ["The dog"] * 9 + ["cat"]) == 1.0

    def test_fewer_than_four_annotators_give_shares(self):
        for answers, score in (
            (["Red."], 1),
            (["blue"], 0),
            (["red", "The red"], 1),
            (["red", "blue"], 1 / 2),
            (["Red."] * 3, 1),
            (["red", "blue", "red"], 2 / 3),
            (["red", "blue", "green"], 1 / 3),
            (["red"] * 4, 1),
            (["red"] * 3 + ["blue"], 3 / 4),  # leave one out: 2/3, 2/3, 2/3 and 1
        ):
            assert vqa_score("red", answers) == pytest.approx(score)
            if len(answers) < 4:
                assert soft_targets(answers, {"red"}).get("red", 0) == pytest.approx(score)

    def test_no_answers(self):
        with pytest.raises(ValueError, match="a question has no answers"):
            vqa_score("cat", [])


class TestScores:
    QUESTIONS = (
        {"answers": ("yes",) * 10, "answer_type": "yes/no", "question_type": "is the"},
        {"answers": ("2",) * 3 + ("3",) * 7, "answer_type": "number", "question_type": "how many"},
        {
            "answers": ("red",) * 1 + ("blue",) * 9,
            "answer_type": "other",
            "question_type": "what color",
        },
        {"answers": ("no",) * 10, "answer_type": "yes/no", "question_type": "is the"},
    )

    def test_overall_and_by_type(self):
        assert vqa_scores(["yes", "two", "red", "yes"], self.QUESTIONS) == (
            {
                "vqa_score": 0.55,
                "vqa_score_number": 0.9,
                "vqa_score_other": 0.3,
                "vqa_score_yes_no": 0.5,
            },
            {
                "by_answer_type": {"number": 0.9, "other": 0.3, "yes/no": 0.5},
                "by_question_type": {"how many": 0.9, "is the": 0.5, "what color": 0.3},
            },
        )

    def test_questions_without_a_type_and_two_decimals_in_percent(self):
        metrics, by_type = vqa_scores(["yes", "no"], [self.QUESTIONS[0], {"answers": ("yes",)}])
        groups = {"by_answer_type": {"yes/no": 1.0}, "by_question_type": {"is the": 1.0}}
        assert (metrics["vqa_score"], by_type) == (0.5, groups)
        assert vqa_scores(["yes"], [{"answers": ("yes",)}]) == ({"vqa_score": 1.0}, {})
        assert vqa_scores(["yes", "no", "no"], [self.QUESTIONS[0]] * 3)[0]["vqa_score"] == 0.3333
