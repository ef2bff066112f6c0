"""Numbers as a reader wants to see them."""

from __future__ import annotations

from bridgetower.analysis.results import Arm, Spread

MINUS, NO_VALUE = "\u2212", "\u2013"

ARM_NAMES: dict[Arm, str] = {"bridgetower": "BridgeTower", "meter": "METER"}


def mean_std(spread: Spread, *, scale: float = 1.0, digits: int = 1, sign: bool = False) -> str:
    """Returns `12.3 ± 0.4`, or the value alone for one seed; with `sign`, `+12.3 ± 0.4`."""
    value = number(scale * spread["mean"], digits=digits, sign=sign)
    return value if spread["std"] is None else f"{value} ± {number(scale * spread['std'], digits=digits)}"


def number(value: float, *, digits: int = 1, sign: bool = False) -> str:
    """Returns a rounded number with a true minus sign and never a negative zero."""
    rounded = round(value, digits) + 0.0
    return f"{rounded:{'+' if sign and rounded else ''}.{digits}f}".replace("-", MINUS)


def count(value: int) -> str:
    """Returns `12 345`, grouped by narrow no-break spaces."""
    return f"{value:,}".replace(",", "\u202f")


def millions(value: int) -> str:
    """Returns a number of parameters in millions, `3.67 M`."""
    return f"{value / 1e6:.2f} M"


def percent(probability: float) -> str:
    """Returns a probability with about two significant digits."""
    value = 100 * probability
    if 0 < value < 0.01:
        return "< 0.01 %"
    digits = 0 if value >= 9.95 else 1 if value >= 0.95 else 2
    return f"{value:.{digits}f} %"


def duration(seconds: float) -> str:
    """Returns `41 s`, `12 min` or `2 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def ordinal(place: int) -> str:
    """Returns `1st`, `2nd`, `11th`."""
    ending = "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending}"


def listing(words: list[str]) -> str:
    """Returns `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def gflops(value: float) -> str:
    """Returns 10⁹ operations, with three digits after the point below 10 and one above."""
    return "< 0.001" if 0 < value < 0.0005 else number(value, digits=3 if value < 10 else 1)
