"""CIFAR and GLUE as benchmarks: metrics, predictions, submissions, and heads that do not fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import originals
import shapes
from bridgetower.data.config import GlueName
from bridgetower.data.single_tower import GLUE, read_glue
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.model.config import HeadsConfig
from bridgetower.predictor import Predictor, load
from bridgetower.tasks.benchmarks import evaluate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    originals.write_cifar10(folder)
    return originals.write_glue(folder)


@pytest.fixture(scope="module")
def make(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a model with a head for CIFAR-10 and one for a task of GLUE."""

    def predictor(name: GlueName = "rte") -> Predictor:
        classes = GLUE[name].classes
        heads = HeadsConfig(mlm=False, itm=False, image=10, text=len(classes) or 1)
        labels = {"image": originals.CIFAR10} | ({"text": classes} if classes else {})
        target = tmp_path_factory.mktemp(name)
        shapes.write_tiny_checkpoint(tiny_dataset, target, replace(shapes.MODEL, heads=heads), labels)
        return load(target, device="cpu")

    return predictor


def measure(predictor: Predictor, benchmark: str, folder: Path, split: str, batch_size: int = 3) -> Any:
    return evaluate(predictor, benchmark, [folder], split, RetrievalConfig(batch_size=batch_size))


def test_cifar(make: Any, folder: Path) -> None:
    predictor = make()
    outcome = measure(predictor, "cifar10", folder, "test")
    pictures = [originals.cifar_picture(40 + row).transpose(1, 2, 0).copy() for row in range(8)]
    with torch.no_grad():
        cls = predictor.model.encode_image(predictor.processor.images(pictures), outputs="cls").cls
        expected = predictor.model.head("image")(cls).argmax(dim=1).tolist()
    assert [row["label"] for row in outcome.predictions] == [originals.CIFAR10[number] for number in expected]
    assert [row["id"] for row in outcome.predictions] == [f"test_batch-{row}" for row in range(8)]
    right = [number == (5 + row) % 10 for row, number in enumerate(expected)]
    assert outcome.metrics == {"accuracy": pytest.approx(sum(right) / 8)}
    assert outcome.counts == {"num_images": 8}
    assert outcome.submission is None
    with pytest.raises(ValueError, match="the image head has 10 classes; expected 100 for cifar100"):
        measure(predictor, "cifar100", folder, "test")


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("cola", {"matthews_correlation"}),
        ("mrpc", {"accuracy", "f1"}),
        ("sts-b", {"pearson_correlation", "spearman_correlation"}),
        ("rte", {"accuracy"}),
        ("mnli", {"accuracy"}),
    ],
)
def test_glue(make: Any, folder: Path, name: GlueName, metrics: set[str]) -> None:
    predictor = make(name)
    outcome = measure(predictor, name, folder, "validation")
    rows = read_glue(folder, name, "validation")
    assert outcome.metrics.keys() == metrics
    assert outcome.counts == {"num_texts": len(rows)}
    assert [row["index"] for row in outcome.predictions] == list(range(len(rows)))
    if metrics == {"accuracy"}:
        right = [row["label"] == expected.label for row, expected in zip(outcome.predictions, rows, strict=True)]
        assert outcome.metrics["accuracy"] == pytest.approx(sum(right) / len(rows))
    for split, file in GLUE[name].submission.items():
        outcome = measure(predictor, name, folder, split)
        assert outcome.metrics == {}
        assert outcome.submission[0] == file
        lines = outcome.submission[1].splitlines()
        assert lines[0] == "index\tprediction"
        assert [line.split("\t") for line in lines[1:]] == [
            [str(row["index"]), row["label"]] for row in outcome.predictions
        ]
        assert len(lines) == len(read_glue(folder, name, split)) + 1


def test_bad_rows_that_may_be_left_out(make: Any, tmp_path: Path) -> None:
    originals.write_glue(tmp_path)
    path = tmp_path / "RTE" / "dev.tsv"
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, lines[0], "7\tcut off", *lines[1:]]) + "\n")
    predictor = make()
    with pytest.raises(ValueError, match=r"dev\.tsv has 8 good and 1 bad rows \(line 3: 2 columns\); max_errors is 0"):
        measure(predictor, "rte", tmp_path, "validation")
    outcome = evaluate(predictor, "rte", [tmp_path], "validation", RetrievalConfig(), max_errors=1)
    assert outcome.counts == {"num_texts": 8}
    assert [row["index"] for row in outcome.predictions] == [0, *range(2, 9)]


def test_the_head_of_another_task(make: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match="the text head predicts entailment, not_entailment; sts-b needs a number"):
        measure(make("rte"), "sts-b", folder, "validation")
    with pytest.raises(ValueError, match="the text head predicts a number; cola needs 0, 1"):
        measure(make("sts-b"), "cola", folder, "validation")


def test_several_folders(make: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match="2 data folders; glue reads one"):
        evaluate(make(), "rte", [folder, folder], "validation", RetrievalConfig())
