"""The form of results.json: what is written is read, spreads are right, and what cannot be compared is refused."""

import json
import subprocess
import sys
from pathlib import Path

import made_up
import pytest

from bridgetower.analysis.results import DemoDataset, DemoResults, curve, spread
from bridgetower.data.info import DatasetInfo, SplitInfo


class TestSpread:
    def test_std_is_the_sample_standard_deviation(self) -> None:
        assert spread([1.0, 2.0, 6.0]) == {"mean": 3.0, "std": pytest.approx(7**0.5), "values": [1.0, 2.0, 6.0]}

    def test_one_value_has_no_std(self) -> None:
        assert spread([5.0]) == {"mean": 5.0, "std": None, "values": [5.0]}


class TestSummary:
    def test_values_are_in_order_of_the_seeds(self) -> None:
        runs = (made_up.run(seed=2, rsum=104.0), made_up.run("meter", 0, 90.0), made_up.run(seed=0, rsum=100.0))
        rsum = made_up.results(*runs).summary()["shapes"]["rsum"]
        assert rsum["bridgetower"] == {"mean": 102.0, "std": pytest.approx(8**0.5), "values": [100.0, 104.0]}
        assert rsum["meter"] == {"mean": 90.0, "std": None, "values": [90.0]}

    def test_differences_are_paired_by_seed(self) -> None:
        ours = (made_up.run(seed=seed, rsum=rsum) for seed, rsum in ((0, 100.0), (1, 104.0), (7, 300.0)))
        theirs = (made_up.run("meter", seed, rsum) for seed, rsum in ((1, 96.0), (0, 90.0)))
        difference = made_up.results(*ours, *theirs).differences()["shapes"]["rsum"]
        assert difference == {"mean": 9.0, "std": pytest.approx(2**0.5), "values": [10.0, 8.0]}

    def test_there_is_no_difference_without_a_common_seed(self) -> None:
        assert made_up.results(made_up.run(seed=0), made_up.run("meter", 1)).differences() == {}


class TestFile:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        results = made_up.results()
        results.write(tmp_path / "results.json")
        assert DemoResults.read(tmp_path / "results.json") == results

    def test_file_holds_what_follows_from_the_runs(self, tmp_path: Path) -> None:
        made_up.results().write(tmp_path / "results.json")
        values = json.loads((tmp_path / "results.json").read_text())
        assert values["summary"]["shapes"]["rsum"]["meter"]["values"] == [120.0, 122.0, 124.0]
        assert values["difference"]["shapes"]["rsum"]["values"] == [10.0, 9.0, 8.0]

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no file .*results\.json"):
            DemoResults.read(tmp_path / "results.json")

    @pytest.mark.parametrize(("content", "message"), [("{", "is not valid JSON"), ("[]", "holds a list")])
    def test_damaged_file(self, tmp_path: Path, content: str, message: str) -> None:
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            DemoResults.read(tmp_path / "results.json")

    def test_missing_field(self) -> None:
        values = made_up.results().to_dict()
        del values["command"]
        with pytest.raises(ValueError, match=r"lacks .*command"):
            DemoResults.from_dict(values)

    def test_missing_figure_of_answers(self) -> None:
        values = made_up.results().to_dict()
        del values["answers"][0]["topics"]["colour"]["majority"]
        with pytest.raises(ValueError, match=r"answers\[0\]\.topics\.colour lacks .*majority"):
            DemoResults.from_dict(values)

    def test_unknown_field(self) -> None:
        with pytest.raises(ValueError, match=r"unknown fields.*extra"):
            DemoResults.from_dict(made_up.results().to_dict() | {"extra": 1})

    def test_part_of_another_form(self) -> None:
        with pytest.raises(ValueError, match=r"results\.runs\[0\] is 3; expected names and values"):
            DemoResults.from_dict(made_up.results().to_dict() | {"runs": [3]})

    def test_other_version(self) -> None:
        with pytest.raises(ValueError, match="version 2, this release reads 1"):
            DemoResults.from_dict(made_up.results().to_dict() | {"version": 2})


class TestComparable:
    def test_arm(self) -> None:
        with pytest.raises(ValueError, match="arm is 'clip'"):
            made_up.run("clip")  # type: ignore[arg-type]

    def test_figure_that_is_no_number(self) -> None:
        with pytest.raises(ValueError, match=r"itc_rsum of bridgetower seed 0 \(test shapes\) is nan"):
            made_up.run(test={"shapes": made_up.figures(itc_rsum=float("nan"))})

    def test_no_runs(self) -> None:
        with pytest.raises(ValueError, match="expected at least one"):
            made_up.results(runs=())

    def test_same_run_twice(self) -> None:
        with pytest.raises(ValueError, match="each arm and seed once"):
            made_up.results(made_up.run(), made_up.run())

    def test_other_number_of_steps(self) -> None:
        with pytest.raises(ValueError, match=r"\[10, 20\] steps; expected equal numbers"):
            made_up.results(made_up.run(), made_up.run("meter", steps=10))

    def test_other_figures(self) -> None:
        other = {"shapes": made_up.figures(extra=1.0)}
        with pytest.raises(ValueError, match="different data sets or figures"):
            made_up.results(made_up.run(), made_up.run("meter", test=other))

    def test_without_retrieval(self) -> None:
        with pytest.raises(ValueError, match=r"\['shapes'\] lack chance_rsum, rsum"):
            made_up.results(made_up.run(test={"shapes": {"mlm_accuracy": 0.5}}))

    def test_data_set_that_is_not_described(self) -> None:
        with pytest.raises(ValueError, match=r"tested on \['shapes'\]"):
            made_up.results(made_up.run(), datasets=())

    def test_parts_that_are_no_sum(self) -> None:
        values = made_up.results().to_dict()
        values["costs"][0]["parameters"] += 1
        with pytest.raises(ValueError, match="parts of bridgetower have 5000000 parameters, the model 5000001"):
            DemoResults.from_dict(values)

    def test_unknown_part(self) -> None:
        values = made_up.results().to_dict()
        values["costs"][0]["gflops_per_pair_by_part"]["tail"] = 1.0
        with pytest.raises(ValueError, match="expected image tower, text tower, fusion encoder, heads"):
            DemoResults.from_dict(values)

    def test_split_without_counts(self) -> None:
        with pytest.raises(ValueError, match="split test of shapes is None"):
            made_up.dataset(splits={"train": {"images": 1, "captions": 1}})


def test_curve_leaves_out_what_is_no_figure() -> None:
    (point,) = curve([{"kind": "validation", "step": 10, "time": 1.7e9, "rsum": 14}])
    assert (point.step, point.figures) == (10, {"rsum": 14.0})


def test_dataset_of_prepared_set() -> None:
    splits = {
        name: SplitInfo(images=number, texts=2 * number, files={}) for name, number in (("train", 5), ("test", 1))
    }
    info = DatasetInfo(
        name="greys",
        seed=0,
        split_rule="by shade",
        sources={"drawn": "1"},
        licences={"pictures": "CC0"},
        settings={},
        splits=splits,
        left_out={},
    )
    found = DemoDataset.of(info)
    assert (found.name, found.split_rule, found.sources, found.licences) == (
        "greys",
        "by shade",
        {"drawn": "1"},
        {"pictures": "CC0"},
    )
    assert found.splits == {"train": {"images": 5, "captions": 10}, "test": {"images": 1, "captions": 2}}


def test_import_loads_neither_torch_nor_matplotlib() -> None:
    code = "import bridgetower.analysis.results, sys; sys.exit(bool({'torch', 'matplotlib'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
