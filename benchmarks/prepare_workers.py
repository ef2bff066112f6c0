"""Pictures per second that `prepare` reads, checks and writes, by threads and by processes in their place.

    python benchmarks/prepare_workers.py

Photo-like JPEGs of 640 x 480 with a table of captions are prepared as a user's own; all ways take turns, and medians
count. Processes are forked from a server.
"""

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
from decoding import photo

from bridgetower.data.own import PairsConfig, prepare_own

DIFFERENT = 40  # pictures that are generated; further ones are copies
WAYS: dict[str, type[Executor] | partial[Executor]] = {
    "threads": ThreadPoolExecutor,
    "processes": partial(ProcessPoolExecutor, mp_context=get_context("forkserver")),
}


def write_source(folder: Path, count: int) -> Path:
    """Writes pictures and the table that describes them."""
    generator, lines = np.random.default_rng(0), ["image,caption"]
    for number in range(min(DIFFERENT, count)):
        photo(640, 480, generator).save(folder / f"{number}.jpg", quality=90)
    for number in range(count):
        if number >= DIFFERENT:
            (folder / f"{number}.jpg").write_bytes((folder / f"{number % DIFFERENT}.jpg").read_bytes())
        lines.append(f"{number}.jpg,picture number {number}")
    (folder / "captions.csv").write_text("\n".join(lines))
    return folder / "captions.csv"


def seconds(table: Path, way: str, workers: int) -> float:
    """Returns how long a way takes to prepare the table, the start of its workers included."""
    with tempfile.TemporaryDirectory() as out, patch("bridgetower.data.prepared_set.ThreadPoolExecutor", WAYS[way]):
        start = time.perf_counter()
        prepare_own("pairs", table, Path(out), PairsConfig(num_workers=workers), progress=False)
        return time.perf_counter() - start


def main() -> None:
    """Prints a line of JSON for each way and number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=3_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    ways = [(way, workers) for workers in options.workers for way in WAYS]
    with tempfile.TemporaryDirectory() as folder:
        table = write_source(Path(folder), options.pictures)
        taken = [[seconds(table, *way) for way in ways] for _ in range(options.repeats)]
    for (way, workers), times in zip(ways, zip(*taken, strict=True), strict=True):
        median = statistics.median(times)
        figures = {"way": way, "workers": workers, "seconds": round(median, 2)}
        print(json.dumps({**figures, "per_second": round(options.pictures / median)}), flush=True)


if __name__ == "__main__":
    main()
