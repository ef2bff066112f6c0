"""Spreads, paired differences, and numbers as text."""

import pytest

from bridgetower.reports import numbers
from bridgetower.reports.numbers import paired_difference, spread, verdict


def test_numbers_as_text():
    for value, sign, expected in (
        *((1.25, True, "+1.2"), (-1.26, False, "\u22121.3")),
        *((-0.01, True, "0.0"), (0.0, True, "0.0"), (1234.5, False, "1234.5")),
    ):
        assert numbers.number(value, sign=sign) == expected
    for probability, expected in {
        **{0.0: "0.00 %", 5e-5: "< 0.01 %", 1e-4: "0.01 %", 0.0042: "0.42 %", 0.042: "4.2 %"},
        **{0.0996: "10 %", 0.42: "42 %", 1.0: "100 %"},
    }.items():
        assert numbers.percent(probability) == expected
    assert numbers.count(1234567) == "1\u202f234\u202f567"
    assert numbers.mean_std(spread([0.1, 0.2, 0.6]), scale=100) == "30.0 ± 26.5"
    assert numbers.mean_std(spread([0.3]), scale=100, sign=True) == "+30.0"


def test_spread_is_the_sample_standard_deviation():
    assert spread([1.0, 2.0, 6.0]) == {
        "mean": 3.0,
        "std": pytest.approx(7**0.5),
        "values": [1.0, 2.0, 6.0],
    }
    assert spread([5.0]) == {"mean": 5.0, "std": None, "values": [5.0]}


def test_paired_differences():
    # Student's t with one degree of freedom: 12.706 standard errors of 1.
    difference = paired_difference([5.0, 8.0], [1.0, 2.0])
    assert (difference["mean"], difference["values"]) == (5.0, [4.0, 6.0])
    assert difference["interval_95"] == pytest.approx((5 - 12.7062, 5 + 12.7062))
    values = [0.0, 1.0] * 50
    interval = paired_difference(values, [0.0] * 100)["interval_95"]
    assert interval is not None
    low, high = interval
    standard_error = spread(values)["std"] / 10
    assert (high - low) / 2 == pytest.approx(1.9842 * standard_error, rel=1e-4)
    assert paired_difference([4.0], [1.0])["interval_95"] is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([10.0, 9.0, 8.0], "higher"),
        ([-10.0, -9.0, -8.0], "lower"),
        ([10.0, 1.0, 8.0], "unclear"),  # all seeds agree on the sign, and still three are too few
        ([0.0, 0.0, 0.0], "unclear"),
        ([10.0], "untested"),
    ],
)
def test_verdict(values, expected):
    assert verdict(paired_difference(values, [0.0] * len(values))) == expected
