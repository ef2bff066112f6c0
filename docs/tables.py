"""Makes the tables and the chart of docs/benchmarks.md from what benchmarks/run.py measured: python docs/tables.py.

docs/measured has a file for each processor, as `--json` writes it; a table shows them side by side.
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
COLOURS = 128  # of the chart, so that it is small
FORWARD = "itm forward, {}, batch {}: {}"
STREAM = "a stream of 16 images with 4 texts each, 4 clients, {}"
COMPARED = {
    **{
        f"{pairs}, {word}, {way}": FORWARD.format(precision, batch, name)
        for word, precision in (("float32", "fp32"), ("bfloat16", "bf16"))
        for pairs, batch in (("one pair", 1), ("eight pairs", 8))
        for way, name in (("`torch`", "plain torch"), ("fastest", "best of ours, best of theirs"))
    },
    "eight pairs, int8, `onnxruntime`": FORWARD.format("int8", 8, "best of ours"),
    "16 images with 4 texts each from 4 clients, float32, OpenVINO": STREAM.format("fp32"),
    "one text with 64 encoded images, per pair": "rerank one text against 64 encoded images, per pair",
    "retrieval, 200 images, 1,000 texts; peer: all pairs": (
        "two-stage retrieval, 200 images, 1000 texts, k 32: transformers on all pairs"
    ),
    "MLM + ITM step, 4 pairs, float32; peer: official composition": "training step mlm + itm, fp32, 4 pairs",
    "peak memory of the MLM + ITM step [GiB]": "peak memory of a training step, 4 pairs",
}
STARTED = {
    "`bridgetower --help`": "bridgetower --help, limit 0.3 s",
    "`load`, base model": "load",
    "first vector of an image": "first vector of an image",
    "`serve` until it is ready": "serve, until it is ready",
    "`bridgetower search demo`": "bridgetower search demo, in the demo's index",
}
# Rows of the chart: a label, and the row of COMPARED.
CHARTED = {
    "eight pairs, PyTorch": "eight pairs, float32, `torch`",
    "eight pairs, fastest engines": "eight pairs, float32, fastest",
    "eight pairs, fastest engines, bfloat16": "eight pairs, bfloat16, fastest",
    "images with 4 texts each, 4 clients": (
        "16 images with 4 texts each from 4 clients, float32, OpenVINO"
    ),
    "training step, MLM + ITM": "MLM + ITM step, 4 pairs, float32; peer: official composition",
}
Rows = Mapping[str, Mapping[str, Any]]


def number(value: float) -> str:
    """Three digits, of large ones all."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def off(rows: list[Mapping[str, Any]]) -> str:
    """The largest difference, with one digit where it is small."""
    largest = max((row.get("max_diff") or 0 for row in rows), default=0)
    return (
        re.sub("e-0?", "e-", f"{largest:.0e}" if largest < 0.01 else f"{largest:.2f}")
        if largest
        else ""
    )


def compared(measured: Mapping[str, Rows]) -> Iterator[list[str]]:
    """The ratio of the peer's time and ours on each processor, both times, and the largest difference anywhere."""
    yield ["ratio (seconds here/there)", *measured, "largest difference"]
    for label, name in COMPARED.items():
        found = [rows.get(name) for rows in measured.values()]
        cells = [
            f"{row['ratio']:.2f} ({number(row['ours_s'])}/{number(row['peer_s'])})" if row else ""
            for row in found
        ]
        yield [label, *cells, off([row for row in found if row])]


def started(measured: Mapping[str, Rows]) -> Iterator[list[str]]:
    """Seconds on each processor."""
    yield ["seconds", *measured]
    for label, name in STARTED.items():
        yield [
            label,
            *(number(rows[name]["ours_s"]) if name in rows else "" for rows in measured.values()),
        ]


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
    """Returns the page with its tables made anew; each follows a comment with its name."""
    measured = measurements()
    tables = (("compared", compared, COMPARED), ("started", started, STARTED))
    for marker, table, names in tables:
        shown = {name: rows for name, rows in measured.items() if rows.keys() & set(names.values())}
        head, *lines = table(shown)
        cells = ([f" {cell} ".replace("  ", " ") for cell in line] for line in (head, *lines))
        top, *below = (f"|{'|'.join(line)}|\n" for line in cells)
        text = "".join([top, "|---" * len(head) + "|\n", *below])
        before, after = page.split(f"<!-- {marker} -->\n\n")
        page = f"{before}<!-- {marker} -->\n\n{text}" + re.sub(r"^([|].*\n)*", "", after)
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw_chart(measurements(), DOCS / "speed.png")
