"""Comparison of finished runs: measures, paired differences, what is written, and what is refused."""

import json
import re

import pytest
from PIL import Image
from scipy.stats import ttest_rel

from bridgetower.cli import main
from bridgetower.reports.comparison import Comparison, FinishedRun, arm_names, finished_runs

CURVES = {
    "bridges": {1: [0.2, 0.5, 0.8], 2: [0.3, 0.5, 0.7], 3: [0.2, 0.6, 0.9]},
    "meter": {1: [0.2, 0.3, 0.6], 2: [0.2, 0.4, 0.6], 3: [0.1, 0.4, 0.7]},
}
STEPS = (10, 20, 30)


def curve_runs(curves=CURVES):
    return tuple(
        FinishedRun(
            arm=arm,
            seed=seed,
            curve=dict(zip(STEPS, values, strict=False)),
            seconds_per_step=0.1 * seed,
        )
        for arm, seeds in curves.items()
        for seed, values in seeds.items()
    )


def comparison(reach=0.5):
    return Comparison(metric="accuracy", reach=reach, runs=curve_runs())


def write_run(folder, seed, bridge, values, cut=""):
    """The files of a run that are read, the last line cut off where a kill came."""
    folder.mkdir(parents=True)
    config = {"recipe": "nano", "seed": seed, "batch_size": 4, "select_by": "accuracy"}
    config["model"] = {"fusion": {"bridge": bridge}}
    (folder / "run.json").write_text(json.dumps(config))
    # It was resumed at step 9: the time of nine of the steps before the first line is not known.
    lines = [
        {"kind": "train", "step": step, "seconds": seconds, "pairs_per_second": 20.0}
        for step, seconds in ((20, 2.2), (30, 2.0))
    ]
    lines += [
        {"kind": "validation", "step": step, "accuracy": value}
        for step, value in zip(STEPS, values, strict=False)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + cut)
    return folder


def write_run_folders(root):
    return {
        arm: [
            write_run(
                root / f"{arm}-{seed}",
                seed,
                "add" if arm == "bridges" else None,
                values,
                cut='{"kind"',
            )
            for seed, values in seeds.items()
        ]
        for arm, seeds in CURVES.items()
    }


def test_measures():
    run = curve_runs()[0]
    assert run.measures(0.5) == {"area": pytest.approx(0.5), "final": 0.8, "steps_to_reach": 20}
    assert run.measures(0.9)["steps_to_reach"] == 30
    assert set(run.measures(None)) == {"area", "final"}


def test_read_as_written():
    assert Comparison.of(json.loads(json.dumps(comparison().to_dict()))) == comparison()


def test_differences_are_paired():
    result = comparison().to_dict()["differences"]["bridges - meter"]["final"]
    ours, theirs = ([values[-1] for values in CURVES[arm].values()] for arm in CURVES)
    expected = ttest_rel(ours, theirs).confidence_interval(0.95)
    assert result["mean"] == pytest.approx(sum(ours) / 3 - sum(theirs) / 3)
    assert result["interval_95"] == pytest.approx((expected.low, expected.high))


def test_seeds_that_one_arm_lacks_are_left_out_of_differences():
    fewer = {
        "bridges": CURVES["bridges"],
        "meter": {seed: CURVES["meter"][seed] for seed in (3, 2)},
    }
    result = Comparison(metric="accuracy", reach=None, runs=curve_runs(fewer))
    assert result.differences("meter")["final"]["values"] == pytest.approx([0.1, 0.2])
    none = {"bridges": {1: CURVES["bridges"][1]}, "meter": {2: CURVES["meter"][2]}}
    alone = Comparison(metric="accuracy", reach=None, runs=curve_runs(none))
    assert alone.differences("meter") == {}
    assert alone.rows()[1][-1] == ["bridges \u2212 meter", "0", "\u2013", "\u2013", ""]


def test_what_cannot_be_compared(refused, tmp_path):
    shorter = curve_runs(CURVES | {"meter": {1: [0.1, 0.2]}})
    for runs_to_compare, message in (
        (
            shorter,
            r"bridges, seed 1 has 3 evaluations up to step 30, meter, seed 1 has 2 evaluations up to step 20",
        ),
        (
            (*curve_runs()[:1], *curve_runs()[:1], *curve_runs()[3:]),
            r"several runs of bridges have the same seed: \[1, 1\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Comparison(metric="accuracy", reach=None, runs=runs_to_compare)
    assert "one arm only (nano); expected runs of at least two" in refused(
        "compare", *write_run_folders(tmp_path)["bridges"]
    )


def test_arms_are_named_by_what_differs(tmp_path):
    paths = write_run_folders(tmp_path)
    run_folders = [*paths["bridges"], *paths["meter"]]
    metric, finished = finished_runs(run_folders, [None] * 6, None)
    assert metric == "accuracy"
    assert [run.arm for run in finished] == 3 * ["model.fusion.bridge=add"] + 3 * [
        "model.fusion.bridge=None"
    ]
    assert [run.seed for run in finished] == [1, 2, 3, 1, 2, 3]
    assert finished[0].curve == dict(zip(STEPS, CURVES["bridges"][1], strict=True))
    assert finished[0].seconds_per_step == pytest.approx(0.2)
    assert arm_names([{"recipe": "nano", "seed": 1}, {"recipe": "nano", "seed": 2}]) == [
        "nano",
        "nano",
    ]


OTHER = '{"kind": "validation", "step": 1, "rsum": 2}\n'


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda run: (run / "run.json").unlink(),
            FileNotFoundError,
            r"holds no run \(run.json is missing\)",
        ),
        (
            lambda run: (run / "metrics.jsonl").unlink(),
            FileNotFoundError,
            r"\(metrics.jsonl is missing\)",
        ),
        (
            lambda run: (run / "metrics.jsonl").write_text(OTHER),
            ValueError,
            r"no accuracy; .* have \['rsum'",
        ),
        (
            lambda run: (run / "metrics.jsonl").write_text(""),
            ValueError,
            r"its evaluations have no evaluations|has no",
        ),
    ],
)
def test_folders_that_hold_no_finished_run(tmp_path, change, error, message):
    run = write_run(tmp_path / "run", 1, "add", [0.1])
    change(run)
    with pytest.raises(error, match=message):
        finished_runs([run], [None], None)


def test_command(run, tmp_path):
    paths = write_run_folders(tmp_path)
    arguments = [
        f"{arm}={folder}" for arm, folders_of_arm in paths.items() for folder in folders_of_arm
    ]
    (printed,) = run("compare", *arguments, "--reach", 0.5, "--out", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert (
        printed
        == written
        == json.loads(json.dumps(comparison().to_dict() | {"arms": printed["arms"]}))
    )
    assert printed["arms"]["meter"]["curves"][2] == {"10": 0.1, "20": 0.4, "30": 0.7}
    with Image.open(tmp_path / "out" / "curves.png") as drawing:
        assert min(drawing.size) > 300
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert re.search(r'<tr class="">\s*<th scope="row">bridges<', page)
    assert re.search(r'<tr class="difference">\s*<th scope="row">bridges \u2212 meter<', page)
    assert "steps to reach 0.5" in page
    assert "http" not in page


def test_table_on_a_terminal(tmp_path, capsys, monkeypatch):
    paths = write_run_folders(tmp_path)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    main(["compare", *map(str, paths["bridges"]), *map(str, paths["meter"])])
    printed = capsys.readouterr().out
    assert "model.fusion.bridge=add \u2212 model.fusion.bridge=None" in printed
    assert "+0.167 (" in printed
