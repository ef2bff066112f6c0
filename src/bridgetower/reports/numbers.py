"""Statistics over seeds, and numbers formatted for readers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal, TypedDict

MINUS = "\u2212"
NO_VALUE = "\u2013"


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

    differences = spread([our - their for our, their in zip(ours, theirs, strict=True)])
    num_seeds = len(differences["values"])
    interval = None
    if differences["std"] is not None:
        quantile = float(student_t.ppf(0.975, num_seeds - 1))
        half_width = quantile * differences["std"] / num_seeds**0.5
        interval = (differences["mean"] - half_width, differences["mean"] + half_width)
    return Difference(**differences, interval_95=interval)


Verdict = Literal["higher", "lower", "unclear", "untested"]


def verdict(difference: Difference) -> Verdict:
    """Returns on which side of zero the interval of a difference lies."""
    interval = difference["interval_95"]
    if interval is None:
        return "untested"
    lower, upper = interval
    if lower > 0:
        return "higher"
    if upper < 0:
        return "lower"
    return "unclear"


def mean_std(spread: Spread, *, scale: float = 1.0, digits: int = 1, sign: bool = False) -> str:
    """Returns `12.3 ± 0.4`, with `sign` `+12.3 ± 0.4`, or the value alone for one seed."""
    mean = number(scale * spread["mean"], digits=digits, sign=sign)
    if spread["std"] is None:
        return mean
    std = number(scale * spread["std"], digits=digits)
    return f"{mean} ± {std}"


def with_interval(difference: Difference, *, scale: float = 1.0, digits: int = 1) -> str:
    """Returns `+4.2 (+2.4 to +6.0)`, the mean and its 95 % interval, or the value alone for one seed."""
    mean = number(scale * difference["mean"], digits=digits, sign=True)
    interval = difference["interval_95"]
    if interval is None:
        return mean
    return f"{mean} ({range_of(interval, scale=scale, digits=digits)})"


def range_of(bounds: tuple[float, float], *, scale: float = 1.0, digits: int = 1) -> str:
    """Returns `+2.4 to +6.0`."""
    return " to ".join(number(scale * bound, digits=digits, sign=True) for bound in bounds)


def number(value: float, *, digits: int = 1, sign: bool = False) -> str:
    """Returns a rounded number with a true minus sign and never a negative zero."""
    rounded = round(value, digits) + 0.0  # no negative zero
    plus = "+" if sign and rounded else ""
    return f"{rounded:{plus}.{digits}f}".replace("-", MINUS)


def count(value: int) -> str:
    """Returns `12 345`, grouped by narrow no-break spaces."""
    return f"{value:,}".replace(",", "\u202f")


def percent(probability: float) -> str:
    """Returns a probability with about two significant digits."""
    value = 100 * probability
    if 0 < value < 0.01:
        return "< 0.01 %"
    if value >= 9.95:
        return f"{value:.0f} %"
    if value >= 0.95:
        return f"{value:.1f} %"
    return f"{value:.2f} %"
