"""Numbers in a form for readers, and sentences that follow from the numbers."""

from __future__ import annotations

from bridgetower.reports.numbers import Difference, number, range_of, verdict
from bridgetower_demo.results import Arm

ARM_NAMES: dict[Arm, str] = {"bridgetower": "BridgeTower", "meter": "METER"}


def millions(value: int) -> str:
    """Returns a number of parameters in millions, `3.67 M`."""
    return f"{value / 1e6:.2f} M"


def duration(seconds: float) -> str:
    """Returns `41 s`, `12 min` or `2 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def ordinal(place: int) -> str:
    """Returns `1st`, `2nd`, `11th`."""
    ending = (
        "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    )
    return f"{place}{ending}"


def listing(words: list[str]) -> str:
    """Returns `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def gflops(value: float) -> str:
    """Returns 10⁹ operations, with three digits after the point below 10 and one above."""
    return "< 0.001" if 0 < value < 0.0005 else number(value, digits=3 if value < 10 else 1)


def comparison(difference: Difference) -> str:
    """Returns a sentence on how bridgetower − meter, shown in percent, is to be read."""
    seeds, mean = len(difference["values"]), number(100 * difference["mean"], sign=True)
    bounds = difference["interval_95"]
    if bounds is None:
        return f"The difference is {mean}; with one seed it could be chance."
    evidence = f"{mean}, 95 % interval {range_of(bounds, scale=100)} over {seeds} paired seeds"
    if verdict(difference) == "unclear":
        return f"No clear difference between the two ({evidence})."
    better, worse = ("BridgeTower", "METER") if difference["mean"] > 0 else ("METER", "BridgeTower")
    return f"{better} is ahead of {worse} ({evidence})."
