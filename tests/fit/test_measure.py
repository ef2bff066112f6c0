"""Scores, intervals and baselines of a fit, by hand and by scipy."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from bridgetower.evaluation.config import Judgement, Outcome
from bridgetower.fitting.measure import HeldOutExamples, Scores, interval_of, result_of


def test_the_interval_is_that_of_a_bootstrap_over_images():
    draw = np.random.default_rng(0)
    values = draw.normal(0.4, 0.2, 300)
    interval = interval_of(values.tolist(), list(range(300)))
    oracle = bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", random_state=1
    ).confidence_interval
    assert interval.mean == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx((oracle.low, oracle.high), abs=0.003)

    # Nine equal values of an image are one observation.
    repeated = interval_of(np.repeat(values, 9).tolist(), np.repeat(np.arange(300), 9).tolist())
    assert (repeated.low, repeated.high) == pytest.approx((interval.low, interval.high))
    alone = interval_of(np.repeat(values, 9).tolist(), list(range(2700)))
    assert alone.high - alone.low == pytest.approx((interval.high - interval.low) / 3, rel=0.15)


def judged(kind, scores, **fields):
    judgements = [
        Judgement(
            id=str(number),
            images=(number,),
            text="",
            target="",
            prediction="",
            score=score,
            error=0.0,
            probability=None,
            **fields,
        )
        for number, score in enumerate(scores)
    ]
    return Outcome(metrics={}, counts={}, judge=lambda: judgements)


def labelled(labels):
    return {
        str(number): {
            "images": [number],
            "entry": {"labels": [label], "labelled": True, "text": ""},
        }
        for number, label in enumerate(labels)
    }


def test_the_majority_is_that_of_the_training_labels():
    tested = labelled(["dog"] * 6 + ["cat"] * 4)
    training = [row["entry"] for row in labelled(["cat"] * 3 + ["dog"] * 2).values()]
    examples = HeldOutExamples("classification", tested, training)
    scores = examples.scores(judged("classification", [1.0] * 9 + [0.0]))
    name, majority = examples.constant_scores(scores)
    assert name == "most frequent answer of training, cat"
    assert majority.interval().mean == pytest.approx(0.4)
    assert examples.chance(("cat", "dog", "cow"), []) == pytest.approx(1 / 3)

    # Rows without a label are no examples; with several labels or none, a guess has no chance.
    tested["0"]["entry"] |= {"labels": [], "labelled": False}
    assert examples.chance(("cat", "dog", "cow"), []) == pytest.approx(1 / 3)
    training += [{"labels": [], "labelled": False}] * 9 + [
        {"labels": ["dog", "cat"], "labelled": True}
    ] * 4
    assert examples.constant_scores(scores)[0] == "most frequent answer of training, cat, dog"
    training += [{"labels": [], "labelled": True}] * 5
    assert examples.constant_scores(scores)[0] == "most frequent answer of training, none"
    tested["1"]["entry"] |= {"labels": []}
    assert examples.chance(("cat", "dog", "cow"), []) is None


@pytest.mark.parametrize("kind", ["entailment", "image-pairs"])
def test_statements_are_compared_with_the_most_frequent_label(kind):
    rows = {
        str(number): {"images": [number], "entry": {"label": label}}
        for number, label in enumerate(["True", "False", "True"])
    }
    training = [{"label": label} for label in ("", "", "", "False", "True", "True")]
    examples = HeldOutExamples(kind, rows, training)
    name, majority = examples.constant_scores(examples.scores(judged(kind, [1.0, 1.0, 0.0])))
    assert name == "most frequent answer of training, True"
    assert list(majority.values.values()) == [1.0, 0.0, 1.0]
    assert examples.chance(("False", "True"), []) == 0.5


@pytest.mark.parametrize(
    ("num_right", "verdict"), [(66, "Better than"), (60, "No improvement over")]
)
def test_without_a_baseline_a_guess_is_below_the_interval(num_right, verdict):
    """Of 50 images with two examples each, 66 ± 13.1 % and 60 ± 13.6 % are right."""
    scores = scores_of([1.0] * num_right + [0.0] * (100 - num_right), per_image=2)
    result = result_of("vqa", scores, [], 0.5)
    assert result.verdict == f"{verdict} guessing, 50.0 %."
    assert (result.num_examples, result.num_images) == (100, 50)
    assert [name for name, _ in result.lines()] == ["model", "guessing"]
    compared = result_of("regression", scores, [("before", scores)], 0.5)
    assert (
        compared.verdict
        == "No improvement over before is shown: the difference is between 0 and 0."
    )
    assert (compared.metric, compared.unit, compared.is_error) == ("mean absolute error", "", True)


def test_answers_are_scored_and_guessed_as_the_official_metric_does():
    answers = ["red", "red", "red", "blue", "blue"] + ["dark red"] * 5
    row = {"images": [0], "entry": {"answers": answers}}
    examples = HeldOutExamples("vqa", {"7": row}, [{"answers": ["Blue."]}, {"answers": []}])
    scores = Scores(values={"7": 1.0}, images={"7": 0})
    name, majority = examples.constant_scores(scores)
    # Of ten annotators two said blue: the mean over nine of min(1, count / 3).
    assert name.endswith("blue")
    assert majority.values["7"] == pytest.approx(0.6)
    # Red .9, blue .6, one that nobody gave, and not dark red, which is no choice.
    assert examples.chance(("red", "blue", "green"), []) == pytest.approx(1.5 / 3)


def test_numbers_are_compared_by_their_error_with_the_median():
    rows = labelled(["1", "2", "9"])
    training = [row["entry"] for row in labelled(["2", "4", "100"]).values()]
    examples = HeldOutExamples("regression", rows, training)
    predictions = [{"id": name, "number": 2.0} for name in rows]
    outcome = Outcome(metrics={}, counts={}, predictions=predictions)
    scores = examples.scores(outcome)
    assert list(scores.values.values()) == [1.0, 0.0, 7.0]
    name, median = examples.constant_scores(scores)
    assert name == "median of training, 4.0"
    assert list(median.values.values()) == [3.0, 2.0, 5.0]
    assert [entry.score for entry in examples.judgements(outcome)] == [1.0, 1.0, 0.0]


def scores_of(values, per_image=1):
    names = [str(number) for number in range(len(values))]
    return Scores(
        values=dict(zip(names, values, strict=True)),
        images={name: number // per_image for number, name in enumerate(names)},
    )


@pytest.mark.parametrize(
    ("kind", "model", "before", "is_improved"),
    [
        ("classification", [1.0] * 60 + [0.0] * 40, [0.0] * 100, True),
        ("classification", [1.0] * 51 + [0.0] * 49, [0.0] * 49 + [1.0] * 51, False),
        # The same difference of means, in each example.
        ("regression", [1.0] * 100, [1.1] * 100, True),
        ("regression", [1.1] * 100, [1.0] * 100, False),
    ],
)
def test_an_improvement_is_beyond_the_interval_of_its_difference(kind, model, before, is_improved):
    result = result_of(kind, scores_of(model), [("before", scores_of(before))], None)
    assert [entry.is_improved for entry in result.baselines] == [is_improved]
    expected = "Better than before" if is_improved else "No improvement over before is shown"
    assert result.verdict.startswith(expected)


def test_texts_count_as_found_by_the_rank_of_their_image():
    examples = HeldOutExamples("pairs", {}, [])
    judgements = [
        Judgement(
            id="a.png",
            images=(0,),
            text=text,
            target="",
            prediction="",
            score=0.0,
            error=float(rank - 1),
            probability=None,
        )
        for text, rank in (("first", 1), ("fifth", 5), ("sixth", 6))
    ]
    outcome = Outcome(metrics={}, counts={}, judge=lambda: judgements)
    assert list(examples.scores(outcome).values.values()) == [1.0, 1.0, 0.0]
    assert examples.constant_scores(examples.scores(outcome)) is None
    folds = [
        Outcome(metrics={"chance_text_to_image_r5": chance}, counts={}) for chance in (0.25, 0.35)
    ]
    assert examples.chance((), folds) == pytest.approx(0.3)
