"""The content of results.json: spreads and differences follow from the runs."""

import json
import subprocess
import sys
from pathlib import Path

import made_up
import pytest

from bridgetower.analysis.results import DemoDataset, curve, paired_difference, spread
from bridgetower.data.prepared_set import DatasetInfo, SplitInfo


class TestSpread:
    def test_std_is_the_sample_standard_deviation(self) -> None:
        assert spread([1.0, 2.0, 6.0]) == {"mean": 3.0, "std": pytest.approx(7**0.5), "values": [1.0, 2.0, 6.0]}

    def test_one_value_has_no_std(self) -> None:
        assert spread([5.0]) == {"mean": 5.0, "std": None, "values": [5.0]}


class TestPairedDifference:
    def test_two_seeds(self) -> None:
        # Student's t with one degree of freedom: 12.706 standard errors of 1.
        found = paired_difference([5.0, 8.0], [1.0, 2.0])
        assert (found["mean"], found["values"]) == (5.0, [4.0, 6.0])
        assert found["interval_95"] == pytest.approx((5 - 12.7062, 5 + 12.7062))

    def test_many_seeds(self) -> None:
        low, high = paired_difference([0.0, 1.0] * 50, [0.0] * 100)["interval_95"] or (0.0, 0.0)
        exact = 1.9842 * spread([0.0, 1.0] * 50)["std"] / 10  # type: ignore[operator]
        assert (high - low) / 2 == pytest.approx(exact, rel=1e-4)

    def test_one_seed_has_no_interval(self) -> None:
        assert paired_difference([4.0], [1.0])["interval_95"] is None


class TestSummary:
    def test_values_are_in_order_of_the_seeds(self) -> None:
        runs = (made_up.run(seed=2, rsum=104.0), made_up.run("meter", 0, 90.0), made_up.run(seed=0, rsum=100.0))
        rsum = made_up.results(*runs).summary()["shapes"]["rsum"]
        assert rsum["bridgetower"] == {"mean": 1.02, "std": pytest.approx(8**0.5 / 100), "values": [1.0, 1.04]}
        assert rsum["meter"] == {"mean": 0.9, "std": None, "values": [0.9]}

    def test_differences_are_paired_by_seed(self) -> None:
        ours = (made_up.run(seed=seed, rsum=rsum) for seed, rsum in ((0, 100.0), (1, 104.0), (7, 300.0)))
        theirs = (made_up.run("meter", seed, rsum) for seed, rsum in ((1, 96.0), (0, 90.0)))
        difference = made_up.results(*ours, *theirs).differences()["shapes"]["rsum"]
        assert difference == paired_difference([1.0, 1.04], [0.9, 0.96])

    def test_differences_of_answers_are_paired_by_seed(self) -> None:
        ours = [made_up.answers(seed=seed, right=right) for seed, right in ((7, 0.1), (1, 0.75), (0, 0.5))]
        theirs = [made_up.answers("meter", seed, right) for seed, right in ((0, 0.25), (1, 0.625))]
        difference = made_up.results(answers=(*ours, *theirs)).answer_differences()
        assert difference == dict.fromkeys(("colour", "overall"), paired_difference([0.5, 0.75], [0.25, 0.625]))

    def test_there_is_no_difference_without_a_common_seed(self) -> None:
        results = made_up.results(made_up.run(seed=0), made_up.run("meter", 1), answers=(made_up.answers(),))
        assert results.to_dict()["difference"] == {}


class TestFile:
    def test_file_holds_what_follows_from_the_runs(self, tmp_path: Path) -> None:
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


def test_dataset_of_prepared_set() -> None:
    splits = {name: SplitInfo(images=number, examples=2 * number) for name, number in (("train", 5), ("test", 1))}
    info = DatasetInfo(
        name="greys",
        split_rule="by shade",
        sources={"drawn": "1"},
        licences={"images": "CC0"},
        settings={},
        splits=splits,
        left_out={},
    )
    found = DemoDataset.of(info)
    assert (found.name, found.split_rule, found.sources, found.licences) == (
        "greys",
        "by shade",
        {"drawn": "1"},
        {"images": "CC0"},
    )
    assert found.splits == {"train": {"images": 5, "captions": 10}, "test": {"images": 1, "captions": 2}}


def test_import_loads_neither_torch_nor_matplotlib() -> None:
    code = "import bridgetower.analysis.results, sys; sys.exit(bool({'torch', 'matplotlib'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
