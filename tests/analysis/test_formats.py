"""Numbers as text."""

import pytest

from bridgetower.analysis import findings
from bridgetower.analysis.results import spread


@pytest.mark.parametrize(
    ("value", "sign", "expected"),
    [
        (1.25, True, "+1.2"),
        (-1.26, False, "\u22121.3"),
        (-0.01, True, "0.0"),
        (0.0, True, "0.0"),
        (1234.5, False, "1234.5"),
    ],
)
def test_number(value: float, sign: bool, expected: str) -> None:
    assert findings.number(value, sign=sign) == expected


def test_mean_std() -> None:
    assert findings.mean_std(spread([0.1, 0.2, 0.6]), scale=100) == "30.0 ± 26.5"
    assert findings.mean_std(spread([0.3]), scale=100, sign=True) == "+30.0"


@pytest.mark.parametrize(
    ("probability", "expected"),
    [
        (0.0, "0.00 %"),
        (5e-5, "< 0.01 %"),
        (0.0042, "0.42 %"),
        (0.042, "4.2 %"),
        (0.0996, "10 %"),
        (0.42, "42 %"),
        (1.0, "100 %"),
    ],
)
def test_percent(probability: float, expected: str) -> None:
    assert findings.percent(probability) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.2, "0 s"), (89.0, "89 s"), (90.1, "2 min"), (3570.0, "1 h 00 min"), (3930.0, "1 h 06 min")],
)
def test_duration(seconds: float, expected: str) -> None:
    assert findings.duration(seconds) == expected


def test_ordinal() -> None:
    places = (1, 2, 3, 4, 11, 12, 13, 21, 102, 111, 113)
    assert [findings.ordinal(place) for place in places] == [
        "1st",
        "2nd",
        "3rd",
        "4th",
        "11th",
        "12th",
        "13th",
        "21st",
        "102nd",
        "111th",
        "113th",
    ]


def test_listing() -> None:
    assert [findings.listing(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]


def test_large_numbers() -> None:
    assert findings.count(1234567) == "1\u202f234\u202f567"
    assert findings.millions(3_669_123) == "3.67 M"


def test_gflops() -> None:
    assert [findings.gflops(value) for value in (0.0, 1e-6, 0.0638, 235.44)] == ["0.000", "< 0.001", "0.064", "235.4"]
