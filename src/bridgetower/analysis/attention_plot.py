"""Attention statistics of several models as a drawing and as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import get_args

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bridgetower.analysis.attention_weights import LayerAttention
from bridgetower.analysis.comparison import LINE_STYLES, png
from bridgetower.model.hidden_states import FusionAttention

Statistics = Mapping[FusionAttention, Sequence[LayerAttention]]
TITLES = ("model", "attention", "layer", "distance", "entropy", "divergence of heads")


def statistics_rows(models: Mapping[str, Statistics]) -> list[list[str]]:
    """Returns the cells of a table under `TITLES`; distance and entropy are means over heads."""
    return [
        [name, kind, str(number + 1), _mean(layer.distance), _mean(layer.entropy), f"{layer.divergence:.3f}"]
        for name, statistics in models.items()
        for kind, layers in statistics.items()
        for number, layer in enumerate(layers)
    ]


def draw_statistics(models: Mapping[str, Statistics]) -> bytes:
    """Returns a PNG: a row for each kind of attention, layers from left to right, a dot for each head."""
    kinds = get_args(FusionAttention)
    with matplotlib.rc_context({"font.size": 10}):
        drawing = Figure(figsize=(10, 2.6 * len(kinds)), layout="constrained")
        grid = drawing.subplots(len(kinds), 3, sharex=True, squeeze=False)
        for kind, (distance, entropy, divergence) in zip(kinds, grid, strict=True):
            unit = "pixels" if kind.startswith("image") else "tokens"
            distance.set(ylabel=f"distance [{unit}]", title=kind)
            entropy.set(ylabel="entropy [nats]", title=kind)
            divergence.set(ylabel="KL between heads [nats]", title=kind)
            if not kind.endswith("self"):
                distance.set_visible(False)
            for (name, statistics), style in zip(models.items(), cycle(LINE_STYLES), strict=False):
                layers = statistics[kind]
                distances = [layer.distance for layer in layers if layer.distance is not None]
                _draw(distance, distances, name, style)
                _draw(entropy, [layer.entropy for layer in layers], name, style)
                _draw(divergence, [[layer.divergence] for layer in layers], name, style)
        grid[0][0].legend()
        for axes in grid[-1]:
            axes.set_xlabel("fusion layer")
        return png(drawing)


def _draw(axes: Axes, layers: Sequence[Sequence[float]], name: str, style: tuple[str, str]) -> None:
    """A line through the means of the layers, and a dot for each head."""
    if not layers:
        return
    ink, line = style
    numbers = range(1, len(layers) + 1)
    axes.plot(numbers, [sum(values) / len(values) for values in layers], line, color=ink, linewidth=2, label=name)
    dots = [(number, value) for number, values in zip(numbers, layers, strict=True) for value in values]
    axes.plot(*zip(*dots, strict=True), "o", color=ink, markersize=3, alpha=0.4)
    axes.set_xticks(numbers)
    axes.grid(visible=True, alpha=0.3)


def _mean(values: Sequence[float] | None) -> str:
    return "" if values is None else f"{sum(values) / len(values):.3f}"
