"""Rows of a table of images or texts, in random batches: Lance as prepared sets use it, beside Parquet.

    python benchmarks/store.py [--rows 10000000]

For rows of random bytes, and for texts alone: milliseconds a row in random batches of 32 and 64, and the bytes that the
process asks the system for per byte of the rows (rchar of /proc/self/io; 1 is the least). Parquet has row groups of
1 MiB, of which one is read for each row and the last is kept. Files are in the system's cache. With --rows, only so
many texts: seconds to open and MiB that this adds, milliseconds for 64 rows, open files.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bridgetower.data.store import Table

GROUP = 2**20
BATCHES = (32, 64)
SCHEMA = pa.schema([("value", pa.large_binary())])
Take = Callable[[Sequence[int]], list[bytes]]


def rows(kind: str, size: int, start: int, count: int) -> pa.Table:
    """Returns rows of random bytes, or of texts of about 80 characters."""
    draw = np.random.default_rng(start)
    if kind == "texts":
        texts = (
            f"a caption of image {n} in the words of one person, number {n % 5}" for n in range(start, start + count)
        )
        values = [text.encode() for text in texts]
    else:
        values = [draw.bytes(size) for _ in range(count)]
    return pa.table([pa.array(values, pa.large_binary())], schema=SCHEMA)


def lance(folder: Path, kind: str, size: int, count: int) -> Table:
    """Writes a table in commits of 64 MiB."""
    table = Table.create(folder / "rows.lance", SCHEMA, checked="value")
    step = max(1, 2**26 // (size or 80))
    for start in range(0, count, step):
        table.append(rows(kind, size, start, min(step, count - start)))
    return Table(folder / "rows.lance")


def parquet(folder: Path, kind: str, size: int, count: int) -> Take:
    """Writes a file with row groups of a MiB; returns what reads rows of it, a group for each."""
    step = max(1, GROUP // (size or 80))
    with pq.ParquetWriter(folder / "rows.parquet", SCHEMA, compression="none", use_dictionary=False) as writer:
        for start in range(0, count, step):
            writer.write_table(rows(kind, size, start, min(step, count - start)))
    file = pq.ParquetFile(folder / "rows.parquet", pre_buffer=False)

    def take(numbers: Sequence[int]) -> list[bytes]:
        found, kept, group = {}, -1, None
        for number in sorted(numbers):
            if number // step != kept:
                kept, group = number // step, file.read_row_group(number // step)["value"]
            assert group is not None
            found[number] = group[number % step].as_py()
        return [found[number] for number in numbers]

    return take


def read_bytes() -> int:
    """Bytes that this process has read, from the cache of the system or not."""
    return int(Path("/proc/self/io").read_text().split()[1])


def measure(take: Take, count: int, batch: int, repeats: int) -> tuple[float, float]:
    """Returns milliseconds a row, and bytes read per byte of a row."""
    draw = np.random.default_rng(batch)
    numbers = [draw.choice(count, batch, replace=False).tolist() for _ in range(repeats + 1)]
    take(numbers[0])
    before, start = read_bytes(), time.perf_counter()
    size = sum(len(value) for chosen in numbers[1:] for value in take(chosen))
    seconds = time.perf_counter() - start
    return 1000 * seconds / batch / repeats, (read_bytes() - before) / size


def compare(kind: str, size: int, count: int, repeats: int) -> None:
    """Prints a line of JSON for each store and batch size."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = lance(folder, kind, size, count)
        ways: dict[str, Take] = {
            "lance": lambda numbers: table.take(numbers, ["value"])["value"].to_pylist(),
            "parquet": parquet(folder, kind, size, count),
        }
        for batch in BATCHES:
            for way, take in ways.items():
                milliseconds, ratio = measure(take, count, batch, repeats)
                figures = {
                    "rows": kind,
                    "bytes": size or 80,
                    "store": way,
                    "batch": batch,
                    "ms_a_row": round(milliseconds, 3),
                }
                print(json.dumps({**figures, "read_per_byte": round(ratio, 2)}), flush=True)


def resident() -> float:
    """MiB of this process in memory."""
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def many(count: int) -> None:
    """Prints a line of JSON for so many texts."""
    with tempfile.TemporaryDirectory() as name:
        lance(Path(name), "texts", 0, count)
        memory, start = resident(), time.perf_counter()
        table = Table(Path(name) / "rows.lance")
        crcs = len(table.crcs())
        opened = time.perf_counter() - start
        milliseconds, _ = measure(lambda chosen: table.take(chosen, ["value"])["value"].to_pylist(), count, 64, 50)
        figures = {"texts": crcs, "open_s": round(opened, 2), "ms_for_64": round(64 * milliseconds, 1)}
        more = {"added_mib": round(resident() - memory), "open_files": len(list(Path("/proc/self/fd").iterdir()))}
        print(json.dumps({**figures, **more}), flush=True)


def main() -> None:
    """Compares both stores, or measures many texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="texts of one large table")
    parser.add_argument("--mib", type=int, default=400, help="of each table of images (default: 400)")
    parser.add_argument("--repeats", type=int, default=20, help="batches (default: 20)")
    given = parser.parse_args()
    if given.rows:
        many(given.rows)
        return
    for size in (15_000, 40_000, 120_000):
        compare("images", size, given.mib * 2**20 // size, given.repeats)
    compare("texts", 0, 500_000, given.repeats)


if __name__ == "__main__":
    main()
