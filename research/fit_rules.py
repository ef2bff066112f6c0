"""What the rules of `bridgetower fit` are worth, on small sets that others made.

    python research/fit_sets.py sets
    python research/fit_rules.py sets --init bridgetower-demo/runs/bridgetower-0/last --out fit-rules.json

Each run changes one rule of `bridgetower.fitting.rules` and is a whole `bridgetower fit` of 100 or 400 training rows,
which are drawn with the seed. The same 300 rows are tested in all runs. Prints a table, writes the runs as JSON, and
goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import bridgetower
from bridgetower.files import write_json
from bridgetower.fitting import rules, run

SETS = {"captions": "captions.csv", "labels": "digits.csv"}
ROWS = (100, 400)
SEEDS = (0, 1)
TESTED = 300
SHUFFLE_SEED = 20


def faster(factor: float) -> dict[str, Any]:
    """The learning rates times a factor."""
    return {"_RATES": {trained: rate * factor for trained, rate in rules._RATES.items()}}


ARMS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "32 batches an epoch": {"_BATCHES_PER_EPOCH": 32},
    "2 batches an epoch": {"_BATCHES_PER_EPOCH": 2},
    "100 steps": {"_STEPS": 100},
    "1,600 steps": {"_STEPS": 1600, "_EPOCHS": (4, 160)},
    "rate / 4": faster(1 / 4),
    "rate x 4": faster(4),
    "top layers too": {"choose_trained": lambda device: "top"},
    "all weights": {"choose_trained": lambda device: "all"},
}


@contextmanager
def changed_rules(changes: dict[str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, value in changes.items():
            module = run if name == "choose_trained" else rules
            stack.enter_context(patch.object(module, name, value))
        yield


def write_splits(source: Path, table: Path, train_rows: int, seed: int) -> None:
    """Writes a table with `train_rows` rows to train on, a fifth as many to validate on, and the tested ones."""
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    random.Random(SHUFFLE_SEED).shuffle(rows)
    tested, others = rows[:TESTED], rows[TESTED:]
    random.Random(seed).shuffle(others)
    splits = {
        "test": tested,
        "train": others[:train_rows],
        "validation": others[train_rows : train_rows + train_rows // 5],
    }
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "split"])
        writer.writeheader()
        for split, entries in splits.items():
            writer.writerows({**entry, "split": split} for entry in entries)


def measure(sets: Path, name: str, arm: str, rows: int, seed: int, init: str) -> dict[str, Any]:
    """Fits one set with the rules of an arm."""
    # The table lies beside its images.
    table = sets / f"{name}-{rows}-{seed}.csv"
    write_splits(sets / SETS[name], table, rows, seed)
    folder = sets / "fit"
    start = time.perf_counter()
    with changed_rules(ARMS[arm]):
        outcome = bridgetower.fit(table, folder, init, seed=seed, progress=False)
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    table.unlink()
    assert outcome.result is not None
    config = outcome.plan.config
    return {
        "set": name,
        "arm": arm,
        "rows": rows,
        "seed": seed,
        "score": outcome.result.model.mean,
        "batch": config.batch_size,
        "epochs": config.max_epochs,
        "seconds": round(seconds, 1),
    }


def print_table(runs: list[dict[str, Any]]) -> None:
    """Prints the mean score of each arm."""
    scores = {(r["set"], r["rows"], r["arm"], r["seed"]): r["score"] for r in runs}
    seconds = defaultdict(list)
    for result in runs:
        seconds[result["arm"]].append(result["seconds"])
    columns = [(name, rows) for name in SETS for rows in ROWS]
    print(
        "| rule | " + " | ".join(f"{name}, {rows} rows" for name, rows in columns) + " | seconds |"
    )
    print("|---" * (len(columns) + 2) + "|")
    for arm in ARMS:
        cells = []
        for name, rows in columns:
            values = [scores.get((name, rows, arm, seed)) for seed in SEEDS]
            known = [value for value in values if value is not None]
            cells.append(" ".join(f"{100 * value:.1f}" for value in known) or "-")
        cells.append(f"{mean(seconds[arm]):.0f}" if seconds[arm] else "-")
        print(f"| {arm} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sets", type=Path, help="folder that fit_sets.py has written")
    parser.add_argument("--init", required=True, help="model that each fit starts from")
    parser.add_argument("--out", type=Path, default=Path("fit-rules.json"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run later")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds

    runs = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else []
    done = {(r["set"], r["rows"], r["arm"], r["seed"]) for r in runs}
    for seed in SEEDS:
        for rows in ROWS:
            for arm in ARMS:
                for name in SETS:
                    if (name, rows, arm, seed) in done or time.monotonic() > end:
                        continue
                    runs.append(measure(options.sets, name, arm, rows, seed, options.init))
                    write_json(options.out, runs)
                    print(json.dumps(runs[-1]), flush=True)
    print_table(runs)


if __name__ == "__main__":
    main()
