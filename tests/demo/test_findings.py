"""Spreads and differences follow from the runs; sentences claim a difference only where the seeds leave one."""

import json
from pathlib import Path

import made_up
import pytest

from bridgetower.reports.numbers import paired_difference
from bridgetower_demo import findings
from bridgetower_demo.results import DemoResults, curve


def gains(*right: float) -> DemoResults:
    """Results whose accuracy with the right image is given per seed, with a wrong one always 0.3."""
    tests = [{"shapes": made_up.metrics(mlm_accuracy=accuracy)} for accuracy in right]
    return made_up.results(*(made_up.run(seed=seed, test=test) for seed, test in enumerate(tests)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([10.0, 9.0, 8.0], "BridgeTower is ahead of METER (+9.0, 95 % interval +6.5 to +11.5 over 3 paired seeds)."),
        ([-10.0, -9.0, -8.0], "METER is ahead of BridgeTower ("),
        ([10.0, 1.0, 8.0], "No clear difference between the two (+6.3, 95 % interval "),
        ([10.0], "The difference is +10.0; with one seed it could be chance."),
    ],
)
def test_comparison(values: list[float], expected: str) -> None:
    difference = paired_difference([value / 100 for value in values], [0.0] * len(values))
    assert findings.comparison(difference).startswith(expected)


@pytest.mark.parametrize(
    ("right", "reading"),
    [
        ((0.50, 0.52, 0.51), "the image helps"),
        ((0.10, 0.12, 0.11), "the image misleads"),
        ((0.25, 0.40, 0.31), "no clear difference"),
        ((0.50,), "one seed: open"),
    ],
)
def test_image_finding(right: tuple[float, ...], reading: str) -> None:
    assert f"({reading})" in findings.image_finding(gains(*right), "shapes")


def test_nothing_is_said_of_what_was_not_measured() -> None:
    metrics = {name: value for name, value in made_up.metrics().items() if not name.startswith(("mlm", "itm"))}
    results = made_up.results(made_up.run(test={"shapes": metrics}))
    assert findings.image_finding(results, "shapes") == findings.matching_finding(results, "shapes") == ""


def test_words() -> None:
    for seconds, shown in {0.2: "0 s", 89.0: "89 s", 90.1: "2 min", 3570.0: "1 h 00 min", 3930.0: "1 h 06 min"}.items():
        assert findings.duration(seconds) == shown
    places = {"st": (1, 21, 101), "nd": (2, 102), "rd": (3, 33), "th": (4, 11, 12, 13, 111, 113)}
    for ending, numbers in places.items():
        assert [findings.ordinal(number) for number in numbers] == [f"{number}{ending}" for number in numbers]


def test_differences_are_paired_by_seed() -> None:
    runs = [made_up.run(seed=seed, rsum=rsum) for seed, rsum in ((0, 100.0), (1, 104.0), (7, 300.0))]
    runs += [made_up.run("meter", seed, rsum) for seed, rsum in ((1, 96.0), (0, 90.0))]
    answers = [made_up.answers(seed=seed, right=right) for seed, right in ((7, 0.1), (1, 0.75), (0, 0.5))]
    answers += [made_up.answers("meter", seed, right) for seed, right in ((0, 0.25), (1, 0.625))]
    results = made_up.results(*runs, answers=tuple(answers))
    assert results.differences()["shapes"]["rsum"] == paired_difference([1.0, 1.04], [0.9, 0.96])
    expected = paired_difference([0.5, 0.75], [0.25, 0.625])
    assert results.answer_differences() == {"colour": expected, "overall": expected}


def test_the_file_holds_what_follows_from_the_runs(tmp_path: Path) -> None:
    made_up.results().write(tmp_path / "results.json")
    values = json.loads((tmp_path / "results.json").read_text())
    assert values["summary"]["shapes"]["rsum"]["meter"]["values"] == [1.2, 1.22, 1.24]
    assert values["difference"]["shapes"]["rsum"]["values"] == pytest.approx([0.1, 0.09, 0.08])
    assert values["difference"]["shapes"]["rsum"]["interval_95"] == pytest.approx([0.06516, 0.11484], abs=1e-5)
    assert values["difference"]["answers"]["overall"]["mean"] == 0.125
    assert values["difference"]["answers"]["overall"]["interval_95"] is None  # one seed of each arm


def test_curve_leaves_out_what_is_no_figure() -> None:
    (point,) = curve([{"kind": "validation", "step": 10, "time": 1.7e9, "rsum": 14}])
    assert (point.step, point.metrics) == (10, {"rsum": 14.0})
