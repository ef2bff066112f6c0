"""The benchmark of threads and processes that prepare pictures: every way prepares them all."""

import json
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "prepare_workers.py"


def test_every_way_is_timed(forked: Path) -> None:
    command = [forked / "python", SCRIPT, "--pictures", "12", "--workers", "2", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["way"], row["workers"]) for row in rows] == [("threads", 2), ("processes", 2)]
    assert all(row["per_second"] > 0 for row in rows)
