"""A task of a user's own, from a file of theirs: trained, continued and measured by the command and in Python."""

import sys
from dataclasses import replace
from importlib import import_module

import pytest

from bridgetower.cli.options import custom_task
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.inference.predictor import load
from bridgetower.tasks.entries import NLVR2
from bridgetower.tasks.table import evaluate
from bridgetower.training.run import read_run, train
from helpers.sets import write_entry_set
from helpers.shapes import shapes_run_config

MODULE = '''
from dataclasses import dataclass, replace

import torch.nn.functional as F
from bridgetower.model.config import HeadsConfig
from bridgetower.objectives.classification import ClassificationTask
from bridgetower.objectives.config import NotAnOption, TaskConfig
from bridgetower.tasks.run_config import OptimizerConfig, RunConfig
from bridgetower.tasks.entries import SNLI_VE
from helpers.shapes import SHAPES_MODEL


@dataclass(frozen=True, kw_only=True)
class SmoothConfig(TaskConfig):
    """Statements, with smoothed labels."""

    metrics = ("accuracy",)

    kind: NotAnOption = "smooth"
    smoothing: float = 0.1


def build(model, config):
    def loss(logits, labels):
        return F.cross_entropy(logits, labels, label_smoothing=config.smoothing), {}

    return ClassificationTask(model, "snli_ve", loss=loss, probabilities=lambda logits: logits.softmax(dim=-1))


RECIPE = RunConfig(
    recipe="smooth-tiny",
    source="a test",
    task=SmoothConfig(),
    model=replace(SHAPES_MODEL, heads=HeadsConfig(mlm=False, itm=False, snli_ve=True)),
    optimizer=OptimizerConfig(lr=1e-2),
    batch_size=4,
    max_steps=2,
    select_by="accuracy",
)
SMOOTH = replace(
    SNLI_VE,
    name="smooth",
    config=SmoothConfig,
    build=build,
    recipes=(RECIPE,),
    fine_tuning=(),
    benchmarks={"smooth-statements": SmoothConfig()},
)
NUMBER = 3
'''


@pytest.fixture
def spec(tmp_path, monkeypatch):
    (tmp_path / "smooth_task.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return custom_task("smooth_task:SMOOTH")


@pytest.fixture
def statement_set(tmp_path):
    return write_entry_set(tmp_path / "set", "snli-ve")


def test_python(spec, statement_set, tmp_path):
    recipe = spec.recipes[0]
    config = replace(recipe, data=replace(shapes_run_config(statement_set).data), device="cpu")
    metrics = train(config, tmp_path / "run", task=spec, progress=False)
    assert train(config, tmp_path / "run", task=spec, resume=True, progress=False) == metrics
    assert read_run(tmp_path / "run", spec).to_dict()["task"] == {
        "kind": "smooth",
        "smoothing": 0.1,
    }
    model = load(tmp_path / "run", device="cpu")
    outcome = evaluate(
        model, "smooth-statements", [statement_set], "validation", RetrievalConfig(), spec=spec
    )
    assert outcome.metrics["accuracy"] == metrics["accuracy"]
    with pytest.raises(
        ValueError, match="there is no benchmark 'vqav2'; expected one of smooth-statements"
    ):
        evaluate(model, "vqav2", [statement_set], "test", RetrievalConfig(), spec=spec)
    with pytest.raises(ValueError, match=r"there is no task 'smooth' among .*; pass its TaskSpec"):
        train(config, tmp_path / "other", progress=False)
    with pytest.raises(
        ValueError, match="task smooth takes a SmoothConfig; the run has a PretrainingConfig"
    ):
        train(shapes_run_config(statement_set), tmp_path / "other", task=spec, progress=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no_such_module:SMOOTH",
            "No module named 'no_such_module'; expected FILE.py:NAME, or module:NAME",
        ),
        (
            "no_such_file.py:SMOOTH",
            "task_spec is no_such_file.py, but there is no such file; expected FILE.py:NAME",
        ),
        (
            "smooth_task",
            "task_spec is smooth_task; expected smooth_task:SNLI_VE, smooth_task:SMOOTH",
        ),
        (
            "smooth_task:ROUGH",
            "task_spec is smooth_task:ROUGH; expected smooth_task:SNLI_VE, smooth_task:SMOOTH",
        ),
        (
            "smooth_task.py:NUMBER",
            "smooth_task.py:NUMBER; NUMBER is a int; expected smooth_task.py:SNLI_VE",
        ),
        (
            "helpers.shapes:SHAPES_MODEL",
            "SHAPES_MODEL is a ModelConfig; expected a module with a TaskSpec",
        ),
    ],
)
def test_no_spec(spec, name, message):
    with pytest.raises(ValueError, match=message):
        custom_task(name)


def test_the_working_directory_is_on_the_path_for_the_named_module_only(tmp_path, monkeypatch):
    (tmp_path / "my_statements.py").write_text("from bridgetower.tasks.entries import NLVR2")
    (tmp_path / "unnamed.py").write_text("raise AssertionError")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    before = list(sys.path)
    assert custom_task("my_statements") is custom_task("my_statements.py:NLVR2") is NLVR2
    assert sys.path == before
    with pytest.raises(ModuleNotFoundError):
        import_module("unnamed")
