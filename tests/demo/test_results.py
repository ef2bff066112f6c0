"""The content of results.json: spreads and differences follow from the runs."""

import json
from pathlib import Path

import made_up
import pytest

from bridgetower.reports.numbers import paired_difference
from bridgetower_demo.results import curve


def test_differences_are_paired_by_seed() -> None:
    runs = [made_up.run(seed=seed, rsum=rsum) for seed, rsum in ((0, 100.0), (1, 104.0), (7, 300.0))]
    runs += [made_up.run("meter", seed, rsum) for seed, rsum in ((1, 96.0), (0, 90.0))]
    answers = [made_up.answers(seed=seed, right=right) for seed, right in ((7, 0.1), (1, 0.75), (0, 0.5))]
    answers += [made_up.answers("meter", seed, right) for seed, right in ((0, 0.25), (1, 0.625))]
    results = made_up.results(*runs, answers=tuple(answers))
    assert results.differences()["shapes"]["rsum"] == paired_difference([1.0, 1.04], [0.9, 0.96])
    expected = paired_difference([0.5, 0.75], [0.25, 0.625])
    assert results.answer_differences() == {"colour": expected, "overall": expected}


def test_the_file_holds_what_follows_from_the_runs(tmp_path: Path) -> None:
    made_up.results().write(tmp_path / "results.json")
    values = json.loads((tmp_path / "results.json").read_text())
    assert values["summary"]["shapes"]["rsum"]["meter"]["values"] == [1.2, 1.22, 1.24]
    assert values["difference"]["shapes"]["rsum"]["values"] == pytest.approx([0.1, 0.09, 0.08])
    assert values["difference"]["shapes"]["rsum"]["interval_95"] == pytest.approx([0.06516, 0.11484], abs=1e-5)
    assert values["difference"]["answers"]["overall"]["mean"] == 0.125
    assert values["difference"]["answers"]["overall"]["interval_95"] is None  # one seed of each arm


def test_curve_leaves_out_what_is_no_figure() -> None:
    (point,) = curve([{"kind": "validation", "step": 10, "time": 1.7e9, "rsum": 14}])
    assert (point.step, point.metrics) == (10, {"rsum": 14.0})
