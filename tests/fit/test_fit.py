"""A fit from its table to its report."""

import csv
import json
import re
import shlex

import numpy as np
import pytest
from PIL import Image

import bridgetower
from bridgetower.cli import main
from bridgetower.fitting import plan
from bridgetower.fitting.survey import FitColumns
from bridgetower.tasks.run_config import METRICS
from bridgetower.tasks.table import spec_of
from bridgetower.training.run import read_run
from bridgetower.training.setup import starting_checkpoint, with_classes

COLOURS = {"red": (220, 30, 30), "green": (20, 170, 60), "blue": (30, 60, 220)}
CELLS = {
    "captions": ("image,caption", lambda name, colour: (name, f"a {colour} wall")),
    "labels": ("image,label", lambda name, colour: (name, colour)),
    "questions": (
        "image,question,answer",
        lambda name, colour: (name, "what colour is it?", colour),
    ),
    "ratings": (
        "image,rating",
        lambda name, colour: (name, list(COLOURS).index(colour) / 2),
    ),
}


def write_table(folder, kind, count, splits=False):
    """Writes images of one noisy colour each, and a table about them."""
    draw = np.random.default_rng(0)
    rows = []
    heading, cells = CELLS[kind]
    for number in range(count):
        colour = list(COLOURS)[number % len(COLOURS)]
        noise = draw.integers(-20, 20, (24, 24, 3))
        pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
        name = f"{number}.png"
        Image.fromarray(pixels).save(folder / name)
        split = ["train", "train", "train", "validation", "test"][number // 3 % 5]
        rows.append((*cells(name, colour), *([split] if splits else [])))
    path = folder / f"{kind}.csv"
    with path.open("w", newline="") as file:
        names = heading.split(",") + (["split"] if splits else [])
        csv.writer(file).writerows([names, *rows])
    return path


def fit(source, out, init, **options):
    return bridgetower.fit(source, out, str(init), progress=False, **options)


def test_classes_of_few_images_are_learnt_and_tested_in_folds(tmp_path, tiny_checkpoint):
    source = write_table(tmp_path, "labels", 60)
    outcome = fit(source, tmp_path / "out", tiny_checkpoint, max_epochs=12)
    result = outcome.result
    # Every image was tested once, by a model that was not trained on it.
    assert (result.num_examples, result.num_images) == (60, 60)
    assert result.chance == pytest.approx(1 / 3)
    (majority,) = result.baselines
    assert majority.interval.mean == pytest.approx(1 / 3)
    assert result.model.mean > 0.9
    assert majority.is_improved
    assert majority.difference.mean == pytest.approx(result.model.mean - 1 / 3)
    folds = [read_run(tmp_path / "out/folds" / fold).data for fold in outcome.plan.folds]
    for data in folds:
        assert data.validation_split not in data.train_splits
        assert len(data.train_splits) == 4
    assert json.loads((tmp_path / "out/result.json").read_text())["verdict"] == result.verdict

    # The model of all images is one like any other.
    model = bridgetower.load(str(outcome.model))
    (choices,) = model.classify([tmp_path / "1.png"])
    assert choices[0].label == "green"
    page = (tmp_path / "out/report.html").read_text()
    assert result.verdict in page
    assert page.count('<figure class="card') >= 8

    # The same call again finds everything done.
    metrics = (tmp_path / "out/run" / METRICS).read_bytes()
    again = fit(source, tmp_path / "out", tiny_checkpoint, max_epochs=12)
    assert again.result == result
    assert (tmp_path / "out/run" / METRICS).read_bytes() == metrics


@pytest.mark.parametrize("kind", ["captions", "questions", "ratings"])
def test_splits_of_the_source_are_used(kind, tmp_path, tiny_checkpoint, answering_checkpoint):
    source = write_table(tmp_path, kind, 60, splits=True)
    init = answering_checkpoint if kind == "questions" else tiny_checkpoint
    outcome = fit(source, tmp_path / "out", init, max_epochs=2)
    result = outcome.result
    assert outcome.model == tmp_path / "out/run/best"
    assert outcome.plan.config.data.validation_split == "validation"
    # Three colours are three captions.
    assert result.num_images == 12 if kind != "captions" else result.num_examples == 3
    names = [baseline.name for baseline in result.baselines]
    expected = {
        "captions": ["the model before"],
        "questions": ["the model before", "most frequent answer of training"],
        "ratings": ["median of training"],
    }
    assert [re.split(",", name)[0] for name in names] == expected[kind]


def test_the_plan_has_the_commands_that_make_the_same_runs(tmp_path, tiny_checkpoint):
    source = write_table(tmp_path, "labels", 40)
    outcome = fit(source, tmp_path / "out", tiny_checkpoint, plan_only=True, max_epochs=1)
    assert outcome.result is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data", "plan.json"]
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert plan["costs"]["minutes"] > 0
    prepare, *runs, last = map(shlex.split, plan["commands"])
    assert prepare[:3] == ["bridgetower", "prepare", "classification"]

    # Of the folds one, and the run of the model.
    for command, config in (
        (runs[0], outcome.plan.fold_config("fold-1")),
        (last, outcome.plan.config),
    ):
        out = tmp_path / "by-commands" / command[-1].rpartition("/")[2]
        main([*command[1:-1], str(out)])
        assert read_run(out) == with_classes(config, spec_of(config.task))


@pytest.mark.parametrize(
    ("kind", "max_epochs", "num_runs", "seconds"),
    [
        # On fixed features: six runs of ten steps, which take 3 s beside the towers; an image is tested once.
        ("labels", 1, 6, {"features": 40.0, "training": 360.0, "evaluating": 20.0}),
        # From random weights: two epochs of nine steps; twice 12 images of validation and 12 of test.
        ("captions", 2, 1, {"training": 180.0, "evaluating": 30.0}),
    ],
)
def test_costs_follow_from_the_second_of_two_steps(
    kind, max_epochs, num_runs, seconds, tmp_path, tiny_checkpoint, monkeypatch
):
    timed = iter([(9.0, 9.0), (2.0, 5.0)])
    monkeypatch.setattr(plan, "TIMED_EXAMPLES", 2)
    monkeypatch.setattr(plan, "_timed_step", lambda context, size: next(timed))
    has_folds = num_runs > 1
    source = write_table(tmp_path, kind, 40 if has_folds else 60, splits=not has_folds)
    init = tiny_checkpoint if has_folds else "none"
    made = fit(source, tmp_path / "out", init, plan_only=True, max_epochs=max_epochs).plan
    costs = made.costs
    assert made.config.batch_size == 4
    assert costs.seconds == {"reading the model": 5.0 * num_runs, **seconds}
    assert costs.minutes == sum(costs.seconds.values()) / 60
    assert costs.steps * costs.step_seconds == seconds["training"]
    assert 100e6 < costs.memory < 100e9

    # The model twice, and of each run two states with the moments of the optimiser.
    spec = spec_of(made.config.task)
    start = starting_checkpoint(with_classes(made.config, spec), spec)
    disk = num_runs * 8 * sum(tensor.nbytes for tensor in start.tensors.values())
    if "features" in seconds:
        vision = start.config.vision
        values = vision.num_tokens * vision.hidden_size * len(start.config.vision_layers)
        disk += 40 * 4 * values
    assert costs.disk == disk


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("image,label\n" + "".join(f"no-{n}.png,a\n" for n in range(40)), "40 bad items"),
        ("image,label\n0.png,a\n1.png,b\n", "at least 10"),
    ],
)
def test_what_cannot_be_learnt_ends_before_a_model_is_read(rows, message, tmp_path):
    write_table(tmp_path, "labels", 12)
    (tmp_path / "rows.csv").write_text(rows)
    with pytest.raises(ValueError, match=message):
        fit(
            tmp_path / "rows.csv",
            tmp_path / "out",
            "none",
            columns=FitColumns(task="pairs", text_column="label"),
        )


def test_without_init_the_error_says_what_can_be_done(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = write_table(tmp_path, "captions", 12)
    with pytest.raises(FileNotFoundError, match=r"GB to download.*none for random weights"):
        bridgetower.fit(source, tmp_path / "out", progress=False)
