"""Learning curves as inline SVG that takes its colours from the page, so that it fits a light and a dark theme."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bridgetower.analysis.formats import ARM_NAMES, listing, number
from bridgetower.analysis.results import Arm, DemoResults

SIZE = (4.8, 2.9)  # inches of 72 SVG units; the page scales it

# Colours that nothing else draws with; each is replaced by a value of the page's style sheet.
_INK, _FAINT = "#000001", "#000002"
_ARM_INKS: dict[Arm, str] = {"bridgetower": "#000003", "meter": "#000004"}
_PAGE_COLOURS = {
    _INK: "currentColor",
    _FAINT: "var(--rule)",
    _ARM_INKS["bridgetower"]: "var(--bridgetower)",
    _ARM_INKS["meter"]: "var(--meter)",
}
_LINES: dict[Arm, str] = {"bridgetower": "-", "meter": "--"}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A validation figure of one arm over training.

    Attributes:
        steps: Where every seed was evaluated.
        values: Of each step, one per seed.
    """

    steps: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]

    @property
    def mean(self) -> list[float]:
        """Mean over seeds at each step."""
        return [fmean(values) for values in self.values]


def curve_of(results: DemoResults, arm: Arm, figure: str) -> Curve:
    """Collects a figure at the steps at which every run of an arm has it."""
    runs = [
        {point.step: point.figures[figure] for point in run.curve if figure in point.figures}
        for run in results.arm_runs(arm)
    ]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    return Curve(steps=tuple(steps), values=tuple(tuple(run[step] for run in runs) for step in steps))


def learning_curve(
    results: DemoResults, figure: str, *, label: str, chance: float | None = None, scale: float = 1.0
) -> str | None:
    """Draws a validation figure of every arm: a line for the mean over seeds, a band from lowest to highest seed.

    The same results give the same bytes.

    Args:
        results: With the runs' curves.
        figure: Name of the figure in them.
        label: Of the vertical axis.
        chance: Value that a guesser reaches, drawn as a dotted line.
        scale: Factor on every value, such as 100 for percent.

    Returns:
        An `<svg>` element, or None if no run has the figure.
    """
    curves = {arm: curve_of(results, arm, figure) for arm in results.arms}
    curves = {arm: curve for arm, curve in curves.items() if curve.steps}
    if not curves:
        return None
    # Element ids are hashes of this salt: fixed, so that the bytes are; one per figure, so that ids differ on a page.
    with matplotlib.rc_context({"svg.hashsalt": figure, "svg.fonttype": "none", "font.family": "sans-serif"}):
        drawing = Figure(figsize=SIZE, layout="constrained")
        axes = drawing.add_subplot()
        for arm, curve in curves.items():
            _draw(axes, arm, curve, scale)
        if chance is not None:
            axes.axhline(chance * scale, color=_INK, linestyle=":", linewidth=1.2)
        _style(axes, label)
        return _inline(drawing, _description(curves, label, scale))


def _draw(axes: Axes, arm: Arm, curve: Curve, scale: float) -> None:
    ink = _ARM_INKS[arm]
    mean = [scale * value for value in curve.mean]
    marker = "o" if len(curve.steps) == 1 else ""
    axes.plot(curve.steps, mean, color=ink, linestyle=_LINES[arm], linewidth=2, marker=marker)
    if len(curve.values[0]) > 1:
        low, high = ([scale * pick(values) for values in curve.values] for pick in (min, max))
        axes.fill_between(curve.steps, low, high, color=ink, alpha=0.18, linewidth=0)


def _style(axes: Axes, label: str) -> None:
    axes.set_xlabel("optimiser steps", color=_INK, fontsize=11)
    axes.set_ylabel(label, color=_INK, fontsize=11)
    axes.tick_params(colors=_INK, color=_FAINT, labelsize=10)
    axes.grid(visible=True, color=_FAINT, linewidth=0.8)
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)


def _description(curves: Mapping[Arm, Curve], label: str, scale: float) -> str:
    """Says in words where the lines start and end."""
    ends = [
        f"{ARM_NAMES[arm]} from {number(scale * curve.mean[0])} at step {curve.steps[0]} "
        f"to {number(scale * curve.mean[-1])} at step {curve.steps[-1]}"
        for arm, curve in curves.items()
    ]
    return f"{label} over optimiser steps: {listing(ends)}"


def _inline(drawing: Figure, description: str) -> str:
    """Returns the drawing as an element that HTML can hold."""
    drawing.patch.set_visible(False)
    stream = io.StringIO()
    drawing.savefig(stream, format="svg")
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].strip()  # without the XML prologue
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)  # a style element would reach the whole page
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")  # HTML needs no namespaces
    opening = re.search(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', svg)
    assert opening is not None  # matplotlib writes one
    # Without width and height it is as wide as its place.
    svg = f'<svg role="img" aria-label="{escape(description)}" {opening[1]}>{svg[opening.end() :]}'
    svg = _drop_unused_ids(svg)
    for ink, colour in _PAGE_COLOURS.items():
        svg = svg.replace(ink, colour)
    return svg


def _drop_unused_ids(svg: str) -> str:
    """Keeps ids that something points to; matplotlib's others repeat from figure to figure."""
    used: Sequence[str] = re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg)
    return re.sub(r'\s+id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
