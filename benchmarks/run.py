"""This package beside its peers, on this machine: python benchmarks/run.py --json rows.json --plot growth.png.

Prints a table: our time, a peer's, their ratio, the target, the largest difference of the outputs, and how near the
matrix products come to the machine's own rate. --json keeps rows in a file, where they replace those of the same name.
Both sides have the same random weights of the base model; their repetitions alternate and medians count. Repetitions in
which other processes were busy are left out, and a row without any other says so. Models and exports are kept in
--cache.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from side_by_side.forward import forward_rows, rank_row, stream_rows
from side_by_side.growth import plot_growth
from side_by_side.nano import nano_row
from side_by_side.retrieval import rerank_row, retrieval_rows
from side_by_side.rows import Row
from side_by_side.setting import Setting
from side_by_side.startup import startup_rows
from side_by_side.training import memory_row, step_rows

from bridgetower.files import write_json

Measure = Callable[[Setting], Iterator[Row]]
MEASURES: dict[str, Measure] = {
    "forward-fp32": partial(forward_rows, precision="fp32", batch=1),
    "forward-bf16": partial(forward_rows, precision="bf16", batch=1),
    "forward-int8": partial(forward_rows, precision="int8", batch=1),
    "batch-fp32": partial(forward_rows, precision="fp32", batch=8),
    "batch-bf16": partial(forward_rows, precision="bf16", batch=8),
    "batch-int8": partial(forward_rows, precision="int8", batch=8),
    "stream": stream_rows,
    "int8-rank": rank_row,
    "rerank": rerank_row,
    "retrieval": retrieval_rows,
    "step": partial(step_rows, contrast=False),
    "step-itc": partial(step_rows, contrast=True),
    "nano": nano_row,
    "memory": memory_row,
    "startup": startup_rows,
}


def main() -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(MEASURES)
    parser.add_argument(
        "--only",
        nargs="*",
        choices=names,
        default=names,
        help="what to measure (default: everything)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny models, once: does it run, are the outputs equal?",
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="PyTorch as it is, of both sides: no export, no compiler",
    )
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--plot", type=Path, help="PNG file: how cost grows, measured for it")
    parser.add_argument(
        "--cache", type=Path, default=Path("benchmark-cache"), help="folder of models and exports"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of every engine"
    )
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    setting = Setting(options.quick, options.cache, options.plain or options.quick)
    rows: list[dict[str, Any]] = []
    for name in options.only:
        print(f"measuring {name}", file=sys.stderr)
        found = setting.apart(_rows, name, setting)
        rows += found
        if options.json:
            replaced = {row["name"] for row in found}
            kept = json.loads(options.json.read_text()) if options.json.exists() else []
            write_json(options.json, [row for row in kept if row["name"] not in replaced] + found)
    if options.plot:
        setting.apart(plot_growth, setting, options.plot)
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Prints a table."""
    table = Table("", "ours", "peer", "ratio", "target", "max diff", "GFLOP/s", "share", "peak GiB")
    for row in rows:
        unit = "" if row["unit"] == "s" else f" {row['unit']}"
        busy = " [yellow](others were busy)[/yellow]" if row["disturbed"] else ""
        table.add_row(
            f"{row['name']}{busy}\n[dim]{' | '.join(filter(None, (row['ours'], row['peer'])))}",
            f"{row['ours_s']:.4g}{unit}",
            _number(row["peer_s"], 4) + unit * bool(row["peer"]),
            f"[{'red' if row['reached'] is False else 'green'}]{_number(row['ratio'], 3)}",
            *(_number(row[name], digits) for name, digits in (("target", 3), ("max_diff", 2))),
            *(_number(row[name], 3) for name in ("gflops", "share", "peak_gib")),
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _rows(name: str, setting: Setting) -> list[dict[str, Any]]:
    return [row.to_dict() for row in MEASURES[name](setting)]


def _number(value: object, digits: int) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float | int) else ""


if __name__ == "__main__":
    main()
