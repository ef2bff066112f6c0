"""The benchmark of GPUs runs through without one, on a small model."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu

pytestmark = pytest.mark.slow


def test_it_runs_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    small = ["--pairs", "4", "--repeats", "1", "--workers", "1", "--images", "20"]
    options = ["--device", "cpu", "--tiny", *small, "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    gpu.main()
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) == 4 + 2 + 2 + 1
    assert all(row.get("pairs_per_second", row.get("images_per_second")) > 0 for row in rows)
    assert {row.get("mfu") for row in rows} == {None}  # of processors nothing is known
    assert all(row["tflops"] > 0 for row in rows if "pairs_per_second" in row and "transformers" not in row["name"])
