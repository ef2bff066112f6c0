"""Figures over seeds, and numbers in a form for readers; importable without torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal, TypedDict

MINUS, NO_VALUE = "\u2212", "\u2013"


class Spread(TypedDict):
    """A metric over seeds."""

    mean: float
    std: float | None  # of the sample; None for one seed
    values: list[float]  # in order of the seeds


class Difference(Spread):
    """A difference over seeds."""

    interval_95: tuple[float, float] | None  # of its mean by Student's t; None for one seed


def spread(values: Sequence[float]) -> Spread:
    """Returns mean and sample standard deviation of at least one value."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean=statistics.fmean(values), std=std, values=list(values))


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Returns ours − theirs, at least one value of each, in the same order of the seeds."""
    from scipy.stats import t as student_t

    found = spread([our - their for our, their in zip(ours, theirs, strict=True)])
    interval, seeds = None, len(found["values"])
    if found["std"] is not None:
        reach = float(student_t.ppf(0.975, seeds - 1)) * found["std"] / seeds**0.5
        interval = found["mean"] - reach, found["mean"] + reach
    return Difference(**found, interval_95=interval)


Verdict = Literal["higher", "lower", "unclear", "untested"]


def verdict(difference: Difference) -> Verdict:
    """Returns whether a difference is clear of the spread between seeds: the interval leaves zero out."""
    bounds = difference["interval_95"]
    if bounds is None:
        return "untested"
    return "higher" if bounds[0] > 0 else "lower" if bounds[1] < 0 else "unclear"


def mean_std(spread: Spread, *, scale: float = 1.0, digits: int = 1, sign: bool = False) -> str:
    """Returns `12.3 ± 0.4`, or the value alone for one seed; with `sign`, `+12.3 ± 0.4`."""
    value = number(scale * spread["mean"], digits=digits, sign=sign)
    return value if spread["std"] is None else f"{value} ± {number(scale * spread['std'], digits=digits)}"


def with_interval(difference: Difference, *, scale: float = 1.0, digits: int = 1) -> str:
    """Returns `+4.2 (+2.4 to +6.0)`, the mean and its 95 % interval, or the value alone for one seed."""
    mean, bounds = number(scale * difference["mean"], digits=digits, sign=True), difference["interval_95"]
    return mean if bounds is None else f"{mean} ({range_of(bounds, scale=scale, digits=digits)})"


def range_of(bounds: tuple[float, float], *, scale: float = 1.0, digits: int = 1) -> str:
    """Returns `+2.4 to +6.0`."""
    return " to ".join(number(scale * bound, digits=digits, sign=True) for bound in bounds)


def number(value: float, *, digits: int = 1, sign: bool = False) -> str:
    """Returns a rounded number with a true minus sign and never a negative zero."""
    rounded = round(value, digits) + 0.0
    return f"{rounded:{'+' if sign and rounded else ''}.{digits}f}".replace("-", MINUS)


def count(value: int) -> str:
    """Returns `12 345`, grouped by narrow no-break spaces."""
    return f"{value:,}".replace(",", "\u202f")


def percent(probability: float) -> str:
    """Returns a probability with about two significant digits."""
    value = 100 * probability
    if 0 < value < 0.01:
        return "< 0.01 %"
    digits = 0 if value >= 9.95 else 1 if value >= 0.95 else 2
    return f"{value:.{digits}f} %"
