"""Every fine-tuning task by the commands: a prepared set, two steps of its recipe, an evaluation, a submission."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import asked
import miniature
import originals
from bridgetower.data.glue import GLUE
from bridgetower.tasks.config import GLUE_FIGURES
from bridgetower.training.recipes import RECIPES as ALL_RECIPES

SMALL = ("--image-size", 20, "--data.max-length", 24, "--data.num-workers", 0, "--precision", "fp32")
STEPS = ("--batch-size", 6, "--micro-batch-size", 3, "--max-epochs", 1, "--log-every", 1, "--evaluate-every", 0)
RECIPES = {
    "vqav2-base": ("vqa", "vqav2", ("--model.heads.vqa", len(asked.ANSWERS))),
    "vqav2-base-no-pretraining": ("vqa", "vqav2", ("--model.heads.vqa", len(asked.ANSWERS))),
    "snli-ve": ("snli-ve", "snli-ve", ()),
    "nlvr2": ("nlvr2", "nlvr2", ()),
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    return {kind: asked.write_set(folder / kind, kind) for kind in asked.KINDS}


@pytest.fixture(scope="module")
def original_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    originals.write_cifar10(folder)
    originals.write_cifar100(folder)
    return originals.write_glue(folder)


@pytest.mark.parametrize("recipe", RECIPES)
def test_train_evaluate_submit(
    run: Callable[..., list[Any]], tiny_checkpoint: Path, sets: dict[str, Path], tmp_path: Path, recipe: str
) -> None:
    kind, benchmark, heads = RECIPES[recipe]
    train = ["train", recipe, "--init", tiny_checkpoint, "--data.folders", sets[kind], "--out", tmp_path / "run"]
    (trained,) = run(*train, *SMALL, *STEPS, *heads)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 3 if kind != "nlvr2" else 2))
    evaluate = ["evaluate", tmp_path / "run" / "last", benchmark, "--data", sets[kind]]
    (report,) = run(*evaluate, "--split", "validation", "--out", tmp_path / "validation")
    assert json.loads((tmp_path / "validation" / "metrics.json").read_text()) == report
    assert (report["benchmark"], report["split"], report["protocol"]) == (benchmark, "validation", "honest")
    figure = "vqa_score" if kind == "vqa" else "accuracy"
    assert report[figure] == pytest.approx(trained[figure])
    (report,) = run(*evaluate, "--split", "test", "--out", tmp_path / "test")
    assert figure not in report
    rows = (tmp_path / "test" / "predictions.jsonl").read_text().splitlines()
    assert len(rows) == report["num_questions" if kind == "vqa" else "num_statements"]
    submission = {"vqa": "submission.json", "nlvr2": "submission.csv"}.get(kind)
    assert {path.name for path in (tmp_path / "test").iterdir()} == {
        "metrics.json",
        "predictions.jsonl",
        *([submission] if submission else []),
    }


@pytest.mark.parametrize(
    ("recipe", "stage"),
    [
        ("retrieval-flickr30k", "two_stage"),
        ("retrieval-coco", "two_stage"),
        ("retrieval-flickr30k-ranking", "one_stage"),
    ],
)
def test_retrieval(
    run: Callable[..., list[Any]], tiny_checkpoint: Path, tmp_path: Path, recipe: str, stage: str
) -> None:
    name = "coco" if recipe == "retrieval-coco" else "flickr30k"
    {"coco": miniature.write_coco, "flickr30k": miniature.write_flickr30k}[name](tmp_path / "originals")
    run("prepare", name, "--source", tmp_path / "originals", "--out", tmp_path / "set")
    train = ["train", recipe, "--init", tiny_checkpoint, "--data.folders", tmp_path / "set", "--out", tmp_path / "run"]
    (trained,) = run(*train, *SMALL, *STEPS)
    evaluate = ["evaluate", tmp_path / "run" / "last", "retrieval", "--data", tmp_path / "set"]
    (report,) = run(*evaluate, "--split", "validation", "--candidates", ALL_RECIPES[recipe].evaluation.candidates)
    assert report["rsum"] == pytest.approx(trained["rsum"])
    (report,) = run(*evaluate, "--protocol", "paper", "--max-captions", 5, "--out", tmp_path / "test")
    assert report["rsum"] == report[f"{stage}_rsum"]
    assert json.loads((tmp_path / "test" / "metrics.json").read_text()) == report


@pytest.mark.parametrize(
    ("recipe", "benchmark", "figure", "submission"),
    [
        ("cifar10", "cifar10", "accuracy", None),
        ("cifar100", "cifar100", "accuracy", None),
        *((f"glue-{name}", name, figures[0], f"{GLUE[name].folder}.tsv") for name, figures in GLUE_FIGURES.items()),
    ],
)
def test_single_towers(
    run: Callable[..., list[Any]],
    tiny_checkpoint: Path,
    original_sets: Path,
    tmp_path: Path,
    recipe: str,
    benchmark: str,
    figure: str,
    submission: str | None,
) -> None:
    train = ["train", recipe, "--init", tiny_checkpoint, "--data.folders", original_sets, "--out", tmp_path / "run"]
    (trained,) = run(*train, *SMALL, *STEPS)
    evaluate = ["evaluate", tmp_path / "run" / "last", benchmark, "--data", original_sets]
    (report,) = run(*evaluate, "--split", "validation", "--out", tmp_path / "validation")
    assert report[figure] == pytest.approx(trained[figure])
    run(*evaluate, "--split", "test", "--out", tmp_path / "test")
    files = {path.name for path in (tmp_path / "test").iterdir()}
    expected = submission if benchmark != "mnli" else "MNLI-m.tsv"
    assert files == {"metrics.json", "predictions.jsonl", *([expected] if expected else [])}
