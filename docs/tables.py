"""Makes the table and the chart of docs/benchmarks.md from what benchmarks/run.py measured: python docs/tables.py.

docs/measured has a file for each processor, as `--json` writes it. The table shows them side by side.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from bridgetower.drawing import INK, SERIES, STYLE, drawn

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "benchmarks.md"
MARKER = "<!-- compared -->\n\n"
COLOURS = 128  # of the chart, so that it is small
FORWARD = "itm forward, {}, batch {}: {}"
STREAM = "a stream of 16 images with 4 texts each, 4 clients, {}"
COMPARED = {
    **{
        f"{pairs}, {word}, {way}": FORWARD.format(precision, batch, name)
        for pairs, batch, word, precision in (
            ("one pair", 1, "float32", "fp32"),
            ("eight pairs", 8, "float32", "fp32"),
            ("eight pairs", 8, "bfloat16", "bf16"),
        )
        for way, name in (("`torch`", "plain torch"), ("fastest", "best of ours, best of theirs"))
    },
    "eight pairs, int8, `onnxruntime`": FORWARD.format("int8", 8, "best of ours"),
    "16 images with 4 texts each from 4 clients, float32, OpenVINO": STREAM.format("fp32"),
    "one text with 64 encoded images, per pair": "rerank one text against 64 encoded images, per pair",
    "retrieval, 200 images, 1,000 texts, beside all pairs": (
        "two-stage retrieval, 200 images, 1000 texts, k 32: transformers on all pairs"
    ),
    "MLM + ITM training step, 4 pairs, float32, beside the official code": "training step mlm + itm, fp32, 4 pairs",
    "peak memory of that step [GiB]": "peak memory of a training step, 4 pairs",
}
# Rows of the chart: a label, and the row of COMPARED.
CHARTED = {
    "eight pairs, PyTorch": "eight pairs, float32, `torch`",
    "eight pairs, fastest engines": "eight pairs, float32, fastest",
    "eight pairs, fastest engines, bfloat16": "eight pairs, bfloat16, fastest",
    "images with 4 texts each, 4 clients": (
        "16 images with 4 texts each from 4 clients, float32, OpenVINO"
    ),
    "training step, MLM + ITM": "MLM + ITM training step, 4 pairs, float32, beside the official code",
}
Rows = Mapping[str, Mapping[str, Any]]


def number(value: float) -> str:
    """Three digits, of large ones all."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def difference(rows: list[Mapping[str, Any]]) -> str:
    """The largest difference of any row, with one digit where it is small."""
    largest = max((row.get("max_diff") or 0 for row in rows), default=0)
    if not largest:
        return ""
    return re.sub("e-0?", "e-", f"{largest:.0e}" if largest < 0.01 else f"{largest:.2f}")


def cell(row: Mapping[str, Any]) -> str:
    """The ratio of a row, and the seconds of both sides."""
    return f"{row['ratio']:.2f} ({number(row['ours_s'])}/{number(row['peer_s'])})"


def table(measured: Mapping[str, Rows]) -> Iterator[list[str]]:
    """The cells of each line: a label, the ratio on each processor, and the largest difference on any."""
    yield ["ratio (seconds here/there)", *measured, "largest difference"]
    yield ["---"] * (len(measured) + 2)
    for label, name in COMPARED.items():
        rows = {processor: rows[name] for processor, rows in measured.items() if name in rows}
        cells = [cell(rows[processor]) if processor in rows else "" for processor in measured]
        yield [label, *cells, difference(list(rows.values()))]


def draw_chart(measured: Mapping[str, Rows], path: Path) -> None:
    """Draws the ratios of a few tasks as bars, one colour for each processor."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        axes = figure.add_subplot()
        height = 0.8 / len(measured)
        for processor, (name, rows) in enumerate(measured.items()):
            ratios = [rows[COMPARED[row]]["ratio"] for row in CHARTED.values()]
            places = [task + height * (processor - 1) for task in range(len(CHARTED))]
            bars = axes.barh(places, ratios, height, color=SERIES[processor], label=name)
            axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_yticks(range(len(CHARTED)), list(CHARTED))
        axes.invert_yaxis()
        axes.set_xlabel(
            "times as fast as transformers, or as the official training step (1: equal)"
        )
        axes.legend(loc="center right", bbox_to_anchor=(1, 0.6), fontsize=8)
        drawn(figure).quantize(COLOURS).save(path, optimize=True)


def measurements() -> dict[str, Rows]:
    """Returns the measured rows of each processor."""
    measured: dict[str, Rows] = {}
    for path in sorted((DOCS / "measured").glob("*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))
        name = rows[0]["processor"].replace("(R)", "").replace(" Processor", "")
        measured[name] = {row["name"]: row for row in rows}
    return measured


def filled(page: str) -> str:
    """Returns the page with its table made anew, which follows a comment."""
    lines = [f"| {' | '.join(cells)} |\n".replace("  ", " ") for cells in table(measurements())]
    before, after = page.split(MARKER)
    return "".join([before, MARKER, *lines, re.sub(r"^([|].*\n)*", "", after)])


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw_chart(measurements(), DOCS / "speed.png")
