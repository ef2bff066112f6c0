"""The benchmarks at tiny sizes: they run, both sides give the same numbers, and rows say what they are to say."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "run.py"
# All but those that need an export, and so take a minute; the engines have tests of their own.
MEASURES = ("forward-fp32", "forward-bf16", "batch-fp32", "rerank", "retrieval", "step", "step-itc", "nano", "help")
MEASURES += ("memory", "growth")
FIELDS = {"name", "ours_s", "peer_s", "peer", "ratio", "target", "max_diff"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("benchmark")
    files = {"--json": folder / "rows.json", "--plot": folder / "growth.png", "--cache": folder / "cache"}
    options = [str(part) for option in files.items() for part in option]
    command = [sys.executable, SCRIPT, "--quick", "--threads", "1", "--only", *MEASURES, *options]
    subprocess.run(command, check=True, capture_output=True)
    assert files["--plot"].read_bytes().startswith(b"\x89PNG")
    return json.loads(files["--json"].read_text())


def of(rows: list[dict[str, Any]], *words: str) -> list[dict[str, Any]]:
    found = [row for row in rows if all(word in row["name"] for word in words)]
    assert found
    return found


def test_every_row_has_a_comparison(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row.keys() >= FIELDS
        assert row["ours_s"] > 0
        assert row["ratio"] == pytest.approx(row["peer_s"] / row["ours_s"])
        assert row["reached"] == (None if row["target"] is None else row["ratio"] >= row["target"])


def test_float32_gives_the_numbers_of_transformers(rows: list[dict[str, Any]]) -> None:
    for row in [*of(rows, "itm forward, fp32"), *of(rows, "rerank"), *of(rows, "nothing shared")]:
        assert row["max_diff"] < 1e-5
    for way, difference in of(rows, "itm forward, fp32", "plain")[0]["details"]["max_diff"].items():
        assert difference < 2e-5, way


def test_losses_are_those_of_the_official_step(rows: list[dict[str, Any]]) -> None:
    for row in of(rows, "training step", "fp32"):
        assert row["max_diff"] < 1e-5


@pytest.mark.parametrize(("others", "disturbed"), [(-1.0, True), (float("inf"), False)])
def test_times_of_which_none_was_undisturbed_are_marked(
    monkeypatch: pytest.MonkeyPatch, others: float, disturbed: bool
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    timing = importlib.import_module("side_by_side.timing")
    monkeypatch.setattr(timing, "OTHERS", others)
    monkeypatch.setattr(timing, "SHORTEST", 0.0)
    found = timing.alternate({"way": lambda: None}, repetitions=2)["way"]
    assert found.disturbed == disturbed
    assert found.seconds > 0


def test_other_precisions_are_near(rows: list[dict[str, Any]]) -> None:
    for row in [*of(rows, "bf16, batch"), *of(rows, "nano")]:
        assert row["max_diff"] < 0.02
