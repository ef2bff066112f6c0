"""Spreads and differences follow from the runs. Sentences claim a difference only where the seeds leave one."""

import json

import made_up
import pytest

from bridgetower.reports.numbers import paired_difference
from bridgetower_demo import findings


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            [10.0, 9.0, 8.0],
            "BridgeTower is ahead of METER (+9.0, 95 % interval +6.5 to +11.5 over 3 paired seeds).",
        ),
        ([-10.0, -9.0, -8.0], "METER is ahead of BridgeTower ("),
        ([10.0, 1.0, 8.0], "No clear difference between the two (+6.3, 95 % interval "),
        ([10.0], "The difference is +10.0; with one seed it could be chance."),
    ],
)
def test_comparison(values, expected):
    difference = paired_difference([value / 100 for value in values], [0.0] * len(values))
    assert findings.comparison(difference).startswith(expected)


def test_headline_is_of_the_largest_test_and_of_bridgetower_alone():
    def tested(recall: float) -> dict[str, dict[str, float]]:
        large = made_up.metrics(two_stage_text_to_image_r5=recall, chance_text_to_image_r5=0.05)
        return {"small": made_up.metrics(), "large": large}

    runs = [
        made_up.demo_run(seed=seed, test=tested(recall)) for seed, recall in ((0, 0.5), (1, 0.75))
    ]
    runs += [made_up.demo_run("meter", seed, test=tested(0.25)) for seed in (0, 1)]
    answers = (
        made_up.demo_answers(),
        made_up.demo_answers(seed=1, right=0.5),
        made_up.demo_answers("meter", right=0.0),
    )
    results = made_up.results(*runs, answers=answers, tests={"small": 20, "large": 50})
    figures = {
        "recall_at_5": 0.625,
        "recall_at_5_by_chance": 0.05,
        "answers_right": 0.625,
        "words_alone_right": 0.55,
    }
    assert results.headline() == {"test": "large", **figures}


def test_differences_are_paired_by_seed():
    runs = [
        made_up.demo_run(seed=seed, rsum=rsum)
        for seed, rsum in ((0, 100.0), (1, 104.0), (7, 300.0))
    ]
    runs += [made_up.demo_run("meter", seed, rsum) for seed, rsum in ((1, 96.0), (0, 90.0))]
    answers = [
        made_up.demo_answers(seed=seed, right=right)
        for seed, right in ((7, 0.1), (1, 0.75), (0, 0.5))
    ]
    answers += [
        made_up.demo_answers("meter", seed, right) for seed, right in ((0, 0.25), (1, 0.625))
    ]
    results = made_up.results(*runs, answers=tuple(answers))
    assert results.differences()["shapes"]["rsum"] == paired_difference([1.0, 1.04], [0.9, 0.96])
    expected = paired_difference([0.5, 0.75], [0.25, 0.625])
    assert results.answer_differences() == {"colour": expected, "overall": expected}


def test_the_file_holds_what_follows_from_the_runs(tmp_path):
    made_up.results().write(tmp_path / "results.json")
    values = json.loads((tmp_path / "results.json").read_text())
    assert values["summary"]["shapes"]["rsum"]["meter"]["values"] == [1.2, 1.22, 1.24]
    assert values["difference"]["shapes"]["rsum"]["values"] == pytest.approx([0.1, 0.09, 0.08])
    assert values["difference"]["shapes"]["rsum"]["interval_95"] == pytest.approx(
        [0.06516, 0.11484], abs=1e-5
    )
    assert values["difference"]["answers"]["overall"]["mean"] == 0.125
    assert values["difference"]["answers"]["overall"]["interval_95"] is None  # one seed of each arm
