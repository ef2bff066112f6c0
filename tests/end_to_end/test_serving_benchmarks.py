"""The benchmarks of search and of the server run, for seconds instead of minutes."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(forked: Path, script: str, out: Path, *options: str) -> Any:
    command = [forked / "python", f"benchmarks/{script}", *options, "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


def test_search_starts(forked: Path) -> None:
    command = [forked / "python", "benchmarks/search.py", "--help"]
    assert "--vectors" in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_abuse(forked: Path, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    short = ("--minutes", "0.1", "--growth", "2")
    busy = ("--rounds", "1", "--beside", "0.05", "--delay", "inf")  # on any machine, however busy
    found = run(forked, "serving_abuse.py", tmp_path / "abuse.json", *short, *busy)
    assert found["problems"] == []
    assert found["valid_answered"] > 20
    (minute,) = found["memory_by_minute"]
    assert 20 < minute["requests"] <= sum(found["statuses"].values())
    assert 0 < minute["mib"] <= found["memory_mib"]["most"]
    kinds = {key.rpartition(" ")[0] for key in found["statuses"]}
    assert kinds >= {"valid", "malformed", "broken_json", "no_http", "oversized", "abandoned", "visit", "made_up"}
    assert kinds & {"odd_filters", "many_scans", "short_chunks", "stalled", "two_lengths", "not_indexed", "unread"}


@pytest.mark.slow
def test_throughput(forked: Path, tmp_path: Path) -> None:
    options = ["--kinds", "texts", "--clients", "8", "--seconds", "0.5", "--rounds", "1"]
    rows = run(forked, "serving.py", tmp_path / "serving.json", *options)
    assert [row["way"] for row in rows] == ["one at a time", "--max-batch 1", "batches"]
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in rows)
