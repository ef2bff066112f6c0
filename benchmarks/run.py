"""This package beside its peers, on this machine: python benchmarks/run.py --json rows.json --plot growth.png.

Prints a table and writes a list of rows: our time, a peer's, their ratio, the target, the largest difference of the
outputs, and how near the matrix products come to the machine's own rate. Both sides have the same random weights of the
base model; their repetitions alternate and medians count. Repetitions in which other processes were busy are left out,
and a row without any other says so. Models and exports are kept in --cache.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from side_by_side.forward import forward_rows, rank_row, stream_rows
from side_by_side.growth import growth, growth_rows, plot
from side_by_side.nano import nano_row
from side_by_side.products import product_rows
from side_by_side.retrieval import rerank_row, retrieval_rows
from side_by_side.rows import Row
from side_by_side.setting import Setting
from side_by_side.startup import startup_row
from side_by_side.timing import CLOCKS, Clock
from side_by_side.training import measure_memory, memory_row, step_rows

from bridgetower.files import write_json

Measure = Callable[[Setting], Iterator[Row]]
MEASURES: dict[str, Measure] = {
    "products": product_rows,
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
    "help": startup_row,
}
GROWTH = "growth"


def main() -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*MEASURES, GROWTH]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="what to measure (default: everything)")
    parser.add_argument("--quick", action="store_true", help="tiny models, once: does it run, are the outputs equal?")
    parser.add_argument("--plain", action="store_true", help="PyTorch as it is, of both sides: no export, no compiler")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--plot", type=Path, help="PNG file for the plot of cost growth")
    parser.add_argument("--cache", type=Path, default=Path("benchmark-cache"), help="folder of models and exports")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every engine")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="processor: where others are busy; 1 thread"
    )
    parser.add_argument("--measure-memory", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.clock == "processor" and options.threads != 1:
        parser.error("--clock processor adds up what threads take; give --threads 1 with it")
    torch.set_num_threads(options.threads)
    Clock.name = options.clock
    options.cache.mkdir(parents=True, exist_ok=True)
    setting = Setting(options.quick, options.cache, options.plain or options.quick)
    if options.measure_memory:
        measure_memory(setting, options.measure_memory)
        return
    rows = _one(setting, options) if len(options.only) == 1 or options.quick else _each_in_a_process(options)
    show(rows)
    if options.json:
        write_json(options.json, rows)


def show(rows: list[dict[str, object]]) -> None:
    """Prints a table."""
    table = Table("", "ours", "peer", "ratio", "target", "max diff", "GFLOP/s", "share", "peak GiB")
    for row in rows:
        unit = "" if row["unit"] == "s" else f" {row['unit']}"
        busy = " [yellow](others were busy)[/yellow]" if row["disturbed"] else ""
        table.add_row(
            f"{row['name']}{busy}\n[dim]{row['ours']} | {row['peer']}",
            f"{row['ours_s']:.4g}{unit}",
            f"{row['peer_s']:.4g}{unit}",
            f"[{'red' if row['reached'] is False else 'green'}]{row['ratio']:.2f}",
            *(_number(row[name], digits) for name, digits in (("target", 3), ("max_diff", 2))),
            *(_number(row[name], 3) for name in ("gflops", "share", "peak_gib")),
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _one(setting: Setting, options: argparse.Namespace) -> list[dict[str, object]]:
    rows: list[Row] = []
    for name in options.only:
        if name in MEASURES:
            rows += MEASURES[name](setting)
        elif name == GROWTH:
            curves = growth(setting)
            rows += growth_rows(curves)
            if options.plot:
                plot(curves, options.plot)
    return [row.to_dict() for row in rows]


def _each_in_a_process(options: argparse.Namespace) -> list[dict[str, object]]:
    """Measures each in a process of its own, so that none sees what another one left in memory."""
    rows: list[dict[str, object]] = []
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            command = [sys.executable, __file__, "--only", name, "--json", file, "--cache", options.cache]
            command += ["--threads", str(options.threads), "--clock", options.clock]
            command += ["--plain"] if options.plain else []
            command += ["--plot", options.plot] if options.plot else []
            subprocess.run(command, check=True)
            rows += json.loads(file.read_text())
    return rows


def _number(value: object, digits: int) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float | int) else ""


if __name__ == "__main__":
    main()
