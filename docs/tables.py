"""Puts what benchmarks/run.py measured into tables of docs/benchmarks.md: python docs/tables.py.

docs/measured has a file for each processor, as `--json` writes it; a table shows them side by side.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "benchmarks.md"
FORWARD = "itm forward, {}, batch {}: {}"
STREAM = "a stream of 16 images with 4 texts each, 4 clients, {}"
COMPARED = {
    **{
        f"{pairs}, {word}, {way}": FORWARD.format(precision, batch, name)
        for word, precision in (("float32", "fp32"), ("bfloat16", "bf16"))
        for pairs, batch in (("one pair", 1), ("eight pairs", 8))
        for way, name in (("`torch`", "plain torch"), ("fastest", "best of ours, best of theirs"))
    },
    "one pair, int8, `onnxruntime`": FORWARD.format("int8", 1, "best of ours"),
    "eight pairs, int8, `onnxruntime`": FORWARD.format("int8", 8, "best of ours"),
    "16 images with 4 texts each from 4 clients, float32, OpenVINO": STREAM.format("fp32"),
    "the same in bfloat16": STREAM.format("bf16"),
    "one text with 64 encoded images, per pair": "rerank one text against 64 encoded images, per pair",
    "retrieval, 200 images, 1,000 texts; peer: all pairs": (
        "two-stage retrieval, 200 images, 1000 texts, k 32: transformers on all pairs"
    ),
    "MLM + ITM step, 4 pairs, float32; peer: official composition": "training step mlm + itm, fp32, 4 pairs",
    "the step in bfloat16; peer in float32": "training step mlm + itm, bf16, 4 pairs",
    "MLM + ITM + ITC step, 4 pairs, float32; likewise": "training step mlm + itm + itc, fp32, 4 pairs",
    "peak memory of the MLM + ITM step [GiB]": "peak memory of a training step, 4 pairs",
    "nano step, 64 pairs, bfloat16; peer: PyTorch's modules, AdamW": (
        "nano training step mlm + itm + itc, bf16, 64 pairs"
    ),
}
STARTED = {
    "`bridgetower --help`": "bridgetower --help, limit 0.3 s",
    "`import bridgetower`": "import bridgetower",
    "`import torch`": "import torch",
    "`from bridgetower import load`, after it": "from bridgetower import load, after torch",
    "`load`, base model": "load",
    "first vector of a text": "first vector of a text",
    "first vector of an image": "first vector of an image",
    "`serve` until it is ready": "serve, until it is ready",
    "`bridgetower search demo`": "bridgetower search demo, in the demo's index",
}
SPENT = {
    **{
        label.removesuffix(", `torch`"): name
        for label, name in COMPARED.items()
        if "`torch`" in label
    },
    "MLM + ITM step, 4 pairs, float32": "training step mlm + itm, fp32, 4 pairs",
    "MLM + ITM step, 4 pairs, bfloat16": "training step mlm + itm, bf16, 4 pairs",
}
COUNTED = {
    **{label: name for label, name in SPENT.items() if label.startswith(("one", "eight"))},
    **{label: name for label, name in COMPARED.items() if name == STREAM.format("fp32")},
}
MULTIPLYING = {"FullyConnected", "MatMul", "Convolution"}  # nodes of OpenVINO
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
    yield ["ratio (seconds of ours/peer)", *measured, "largest difference"]
    for label, name in COMPARED.items():
        found = [rows.get(name) for rows in measured.values()]
        cells = [
            f"{row['ratio']:.2f} ({pair(row['ours_s'], row['peer_s'])[0]})" if row else ""
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


def spent(measured: Mapping[str, Rows]) -> Iterator[list[str]]:
    """Percent of the time by kind of operation, those that take most first, and the share of the products' own rate."""
    found = [
        (f"{label}; {processor}", row, row["details"]["operations"])
        for label, name in SPENT.items()
        for processor, rows in measured.items()
        if (row := rows.get(name)) and "operations" in row.get("details", {})
    ]
    kinds = {kind for _, _, shares in found for kind in shares}
    columns = sorted(kinds, key=lambda kind: (-found[0][2].get(kind, 0), kind))
    yield ["percent of the time", *columns, "rate beside the products alone"]
    for label, row, shares in found:
        cells = [f"{100 * shares.get(kind, 0):.0f}" for kind in columns]
        yield [label, *cells, f"{row['share']:.2f}" if row["share"] else ""]


def counted(measured: Mapping[str, Rows]) -> Iterator[list[str]]:
    """Products that each side computes, and seconds of products and of all else by OpenVINO's counters."""
    yield [
        "",
        "GFLOP: ours/peer",
        "ratio",
        "seconds of products: ours/peer",
        "ratio",
        "seconds of all else: ours/peer",
    ]
    for label, name in COUNTED.items():
        for processor, rows in measured.items():
            details = rows.get(name, {}).get("details", {})
            if "gflop" not in details:
                continue
            products, rest = ["", ""], ["", ""]
            if nodes := details.get("openvino"):
                taken = [
                    sum(each[kind] for kind in each.keys() & MULTIPLYING) for each in nodes.values()
                ]
                products = pair(*taken)
                rest = pair(
                    *(
                        sum(each.values()) - own
                        for each, own in zip(nodes.values(), taken, strict=True)
                    )
                )
            yield [f"{label}; {processor}", *pair(*details["gflop"].values()), *products, rest[0]]


def pair(ours: float, theirs: float) -> list[str]:
    """Both, and how many times ours theirs is."""
    return [f"{number(ours)}/{number(theirs)}", f"{theirs / ours:.2f}"]


def filled(page: str) -> str:
    """Returns the page with its tables made anew; each follows a comment with its name."""
    measured: dict[str, Rows] = {}
    for path in sorted((DOCS / "measured").glob("*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))
        name = rows[0]["processor"].replace("(R)", "").replace(" Processor", "")
        measured[name] = {row["name"]: row for row in rows}
    tables = (
        ("compared", compared, COMPARED),
        ("started", started, STARTED),
        ("spent", spent, SPENT),
        ("counted", counted, COUNTED),
    )
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
