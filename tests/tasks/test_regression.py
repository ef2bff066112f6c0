"""A user's own table with numbers as labels: prepared, trained, measured, used."""

from dataclasses import replace

import pytest
import torch

from bridgetower.data.sets.custom import prepare_custom
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.inference.predictor import load
from bridgetower.model.config import HeadsConfig
from bridgetower.tasks.entries import REGRESSION, ClassificationConfig, RegressionConfig
from bridgetower.tasks.spec import ExampleSource
from bridgetower.tasks.table import RECIPES, evaluate
from bridgetower.training.run import train
from helpers.shapes import SHAPES_MODEL, shapes_run_config


def write_ratings(path):
    path.parent.mkdir(parents=True)
    path.write_text("text,rating\n" + "".join(f"a thing of {n},{n / 4}\n" for n in range(40)))
    return path


@pytest.fixture(scope="module")
def rated_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("ratings")
    prepare_custom(
        "regression", write_ratings(root / "source" / "ratings.csv"), root / "set", progress=False
    )
    return root / "set"


@pytest.fixture(scope="module")
def regression_config(rated_set, tiny_checkpoint):
    return shapes_run_config(
        rated_set,
        task=RegressionConfig(),
        select_by="pearson_correlation",
        evaluation=RetrievalConfig(),
        model=replace(SHAPES_MODEL, heads=HeadsConfig(mlm=False, itm=False, classification=1)),
        init=str(tiny_checkpoint),
        max_steps=2,
        device="cpu",
    )


def test_training_evaluation_and_use(run, regression_config, rated_set, tmp_path):
    metrics = train(regression_config, tmp_path / "run", progress=False)
    assert metrics.keys() == {*RegressionConfig.metrics, "mean_absolute_error"}
    model = load(tmp_path / "run" / "last", device="cpu")
    outcome = evaluate(model, "regression", [rated_set], "validation", RetrievalConfig())
    # correlations magnify rounding
    assert dict(outcome.metrics) == pytest.approx(metrics, abs=1e-4)
    texts = ["a thing of 1", "a thing of 2"]
    numbers = model.estimate(texts=texts)
    assert numbers.shape == (2,)
    assert not torch.equal(numbers[:1], numbers[1:])
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    for arguments in (["--texts", *texts], [tmp_path / "texts.txt"]):
        rows = run("classify", tmp_path / "run" / "last", *arguments, "--device", "cpu")
        assert [row["number"] for row in rows] == pytest.approx(numbers.tolist(), abs=1e-5)
    with pytest.raises(
        ValueError, match="head of this model predicts a number, not classes; use estimate"
    ):
        model.classify(texts=texts)


def test_a_set_or_a_head_of_the_other_kind(regression_config, tiny_processor, tmp_path):
    heads = HeadsConfig(classification=1, multi_label=True)
    values = {
        "data": regression_config.data,
        "splits": ("test",),
        "processor": tiny_processor,
        "task": regression_config.task,
    }
    source = ExampleSource(**values, heads=heads, use="test")
    with pytest.raises(ValueError, match="regression takes a model whose head has one output"):
        REGRESSION.examples(source)
    heads = RECIPES["classification"].model.heads
    classes = replace(
        regression_config,
        task=ClassificationConfig(),
        select_by="accuracy",
        recipe="classification",
    )
    classes = replace(classes, model=replace(regression_config.model, heads=heads))
    with pytest.raises(ValueError, match=r"has a number per row, .*; choose the task regression"):
        train(classes, tmp_path / "classes", progress=False)
