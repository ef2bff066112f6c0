"""Sentences claim a difference only where the spread between seeds leaves one."""

import made_up
import pytest

from bridgetower.reports.numbers import paired_difference
from bridgetower_demo import findings
from bridgetower_demo.results import DemoResults


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


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.2, "0 s"), (89.0, "89 s"), (90.1, "2 min"), (3570.0, "1 h 00 min"), (3930.0, "1 h 06 min")],
)
def test_duration(seconds: float, expected: str) -> None:
    assert findings.duration(seconds) == expected


def test_ordinal() -> None:
    places = {"st": (1, 21, 101), "nd": (2, 102), "rd": (3, 33), "th": (4, 11, 12, 13, 111, 113)}
    for ending, numbers in places.items():
        assert [findings.ordinal(number) for number in numbers] == [f"{number}{ending}" for number in numbers]
