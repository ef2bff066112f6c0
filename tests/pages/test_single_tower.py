"""The example of CIFAR on the image tower and GLUE on the text tower: files, prepared sets, runs, metrics."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics as official

from bridgetower import Extensions
from bridgetower.checkpoints import read_checkpoint
from bridgetower.cli import main
from bridgetower.data.batches.batch import BatchKey
from bridgetower.data.config import DataConfig, PrepareConfig
from bridgetower.data.sets.datasets import prepare_set
from bridgetower.data.sets.prepared_set import PreparedSet
from bridgetower.data.sets.schema import CLASSIFICATION
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.extras import load_object
from bridgetower.inference.predictor import load
from bridgetower.model.config import HeadsConfig
from bridgetower.tasks.spec import ExampleSource
from bridgetower.tasks.table import evaluate
from bridgetower.training.run import train
from helpers.published_sets import (
    CIFAR10_CLASSES,
    cifar_picture,
    write_cifar10,
    write_cifar100,
    write_glue,
)
from helpers.shapes import SHAPES_MODEL, shapes_run_config

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "single_tower.py")
OWN = load_object("extensions", EXAMPLE, Extensions)
example = sys.modules[EXAMPLE]
TRAINED = ("cifar10", "cola", "mrpc", "stsb", "mnli")


def spec_of(name):
    return getattr(example, name.upper())


@pytest.fixture(scope="module")
def original_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    write_cifar10(folder)
    write_cifar100(folder)
    return write_glue(folder)


@pytest.fixture(scope="module")
def example_sets(original_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for name in example.SETS:
        example.main([name, str(original_files), str(folder / name)])
    return {name: folder / name for name in example.SETS}


@pytest.fixture(scope="module")
def example_runs(example_sets, tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in TRAINED:
        spec = spec_of(name)
        config = shapes_run_config(
            example_sets[name],
            task=spec.benchmarks[name],
            select_by=spec.benchmarks[name].metrics[0],
            evaluation=RetrievalConfig(),
            model=replace(SHAPES_MODEL, heads=HeadsConfig(mlm=False, itm=False, custom=(name,))),
            init=str(tiny_checkpoint),
            max_steps=2,
            micro_batch_size=4,
        )
        train(config, folder / name, task=spec, extensions=OWN, progress=False)
    return {name: folder / name for name in TRAINED}


def entries_of_split(folder, split, schema=example.TEXTS):
    return [row["entry"] for row in PreparedSet(str(folder), (split,), schema).scan()]


class TestSets:
    def test_pictures_and_classes_of_cifar(self, example_sets, tiny_processor):
        source = ExampleSource(
            data=DataConfig(folders=(str(example_sets["cifar10"]),)),
            splits=("train",),
            processor=tiny_processor,
            task=example.CIFAR10.benchmarks["cifar10"],
            names=CIFAR10_CLASSES,
            use="train",
        )
        batch = example.CIFAR10.examples(source)[BatchKey((9, 0), 3)]
        pictures = [
            np.ascontiguousarray(cifar_picture(number).transpose(1, 2, 0)) for number in (9, 0)
        ]
        assert torch.equal(batch.pixel_values, tiny_processor.images(pictures))
        assert batch.labels.tolist() == [2, 0]  # row 1 of file 1, row 0 of file 0
        assert batch.ids == ("data_batch_2-1", "data_batch_1-0")

    def test_splits_of_cifar(self, example_sets):
        entries = {
            split: entries_of_split(example_sets["cifar10"], split, CLASSIFICATION)
            for split in ("train", "validation", "test")
        }
        assert {split: len(names) for split, names in entries.items()} == {
            "train": 36,
            "validation": 4,
            "test": 8,
        }
        ids = [entry["example_id"] for entry in entries["validation"]]
        assert ids == [f"data_batch_5-{row}" for row in range(4, 8)]
        fine = entries_of_split(example_sets["cifar100"], "train", CLASSIFICATION)
        assert [entry["labels"] for entry in fine] == [
            [f"class_{7 * row % 100}"] for row in range(18)
        ]

    @pytest.mark.parametrize(
        ("name", "row", "texts", "label"),
        [
            ("cola", 1, ['The "car honked down the road.'], "0"),  # a quote is a letter
            ("sst2", 0, ["hide new secretions from the parental units"], "0"),
            (
                "mrpc",
                0,
                ["Amrozi accused his brother .", "Referring to him , Amrozi accused ."],
                "1",
            ),  # after a BOM
            ("qqp", 1, ["How do I?", "How to?"], "1"),
            ("stsb", 1, ["A man plays a flute.", "A man plays."], "3.80"),
            ("rte", 0, ["No weapons found.", "Weapons found."], "not_entailment"),
            ("qnli", 1, ["What is it?", "It is a cat."], "entailment"),
            (
                "mnli",
                2,
                ["The old one.", "The new one"],
                "contradiction",
            ),  # the gold label, not the first annotator's
        ],
    )
    def test_rows_of_glue(self, example_sets, name, row, texts, label):
        assert entries_of_split(example_sets[name], "train")[row] == {
            "index": row,
            "texts": texts,
            "label": label,
        }
        task = example.GLUE[name]
        for split in task.splits:
            labels = {entry["label"] for entry in entries_of_split(example_sets[name], split)}
            assert labels == {""} if "test" in split else labels <= (set(task.classes) or labels)

    def test_bad_rows(self, tmp_path):
        path = write_glue(tmp_path) / "QQP" / "train.tsv"
        header, *lines = path.read_text().splitlines()
        path.write_text(
            "\n".join([header, lines[0], "7\tcut off", "8\t9\t10\ta?\tb?\tmaybe", *lines[1:]])
            + "\n"
        )
        with pytest.raises(
            ValueError,
            match=r"2 bad items.*train\.tsv, line 3: 2 columns \| .* line 4: label 'maybe'",
        ):
            prepare_set(
                example.SETS["qqp"],
                tmp_path,
                tmp_path / "set",
                PrepareConfig(max_errors=1),
                progress=False,
            )
        example.main(["qqp", str(tmp_path), str(tmp_path / "set"), "--max-errors", "2"])
        assert [entry["index"] for entry in entries_of_split(tmp_path / "set", "train")] == [
            0,
            *range(3, 10),
        ]


def test_text_head_is_the_one_of_transformers():
    roberta = pytest.importorskip("transformers.models.roberta.modeling_roberta")
    config = roberta.RobertaConfig(hidden_size=32, num_labels=3, hidden_dropout_prob=0.1)
    theirs = roberta.RobertaClassificationHead(config)
    ours = example.TextHead(32, 3, 0.1)
    ours.dense.load_state_dict(theirs.dense.state_dict())
    ours.decoder.load_state_dict(theirs.out_proj.state_dict())
    hidden = torch.randn(4, 5, 32)
    for training in (True, False):
        outputs = []
        for head, inputs in ((ours, hidden[:, 0]), (theirs, hidden)):
            torch.manual_seed(0)
            outputs.append(head.train(training)(inputs))
        torch.testing.assert_close(*outputs, atol=1e-6, rtol=0)


class TestRuns:
    def test_only_the_tower_that_is_read_learns_and_names_travel(
        self, example_runs, tiny_checkpoint
    ):
        before = read_checkpoint(tiny_checkpoint).tensors
        classes = {
            "cifar10": CIFAR10_CLASSES,
            "stsb": (),
            "mnli": ("entailment", "neutral", "contradiction"),
        }
        for name, names in classes.items():
            after = read_checkpoint(example_runs[name], extensions=OWN)
            changed = {
                key
                for key in before
                if key in after.tensors and not before[key].equal(after.tensors[key])
            }
            assert changed
            assert all(
                key.startswith("vision." if name == "cifar10" else "text.") for key in changed
            )
            assert after.class_names(name) == names

    def test_cifar(self, example_runs, example_sets):
        model = load(example_runs["cifar10"], extensions=OWN, device="cpu")
        outcome = evaluate(
            model,
            "cifar10",
            [example_sets["cifar10"]],
            "test",
            RetrievalConfig(batch_size=3),
            spec=example.CIFAR10,
        )
        pictures = [cifar_picture(40 + row).transpose(1, 2, 0).copy() for row in range(8)]
        with torch.no_grad():
            cls = model.model.encode_image(model.processor.images(pictures), outputs="cls").cls
            expected = model.model.head("cifar10")(cls).argmax(dim=1).tolist()
        assert [row["labels"] for row in outcome.predictions] == [
            [CIFAR10_CLASSES[number]] for number in expected
        ]
        assert [row["id"] for row in outcome.predictions] == [
            f"test_batch-{row}" for row in range(8)
        ]
        right = [number == (5 + row) % 10 for row, number in enumerate(expected)]
        assert outcome.metrics["accuracy"] == pytest.approx(sum(right) / 8)

    @pytest.mark.parametrize("name", TRAINED[1:])
    def test_glue(self, example_runs, example_sets, name, capsys):
        model = load(example_runs[name], extensions=OWN, device="cpu")
        task = example.GLUE[name]
        entries = entries_of_split(example_sets[name], "validation")
        text = model.processor.pad(model.processor.pair_ids([entry["texts"] for entry in entries]))
        with torch.no_grad():
            cls = model.model.encode_text(text.input_ids, text.attention_mask, outputs="cls").cls
            logits = model.model.head(name)(cls)
        numbers = logits.argmax(dim=1).tolist() if task.classes else logits[:, 0].tolist()
        labels = [task.classes[number] if task.classes else f"{number:.3f}" for number in numbers]
        truth = [
            task.classes.index(entry["label"]) if task.classes else float(entry["label"])
            for entry in entries
        ]
        outcome = evaluate(
            model,
            name,
            [example_sets[name]],
            "validation",
            RetrievalConfig(batch_size=4),
            spec=spec_of(name),
        )
        assert [row["label"] for row in outcome.predictions] == labels
        metrics = {
            "accuracy": official.accuracy_score,
            "f1": official.f1_score,
            "matthews_correlation": official.matthews_corrcoef,
            "pearson_correlation": lambda first, second: np.corrcoef(first, second)[0, 1],
        }
        assert outcome.metrics.keys() == set(task.metrics)
        for metric in metrics.keys() & outcome.metrics.keys():
            assert outcome.metrics[metric] == pytest.approx(
                metrics[metric](truth, numbers), abs=1e-5
            )

        names = [
            "--task-spec",
            f"{EXAMPLE}:{name.upper()}",
            "--extensions",
            EXAMPLE,
            "--device",
            "cpu",
        ]
        for split in task.splits:
            if "test" in split:
                out = example_runs[name].parent / f"{name}-{split}"
                command = [
                    "evaluate",
                    str(example_runs[name]),
                    name,
                    *names,
                    "--data",
                    str(example_sets[name]),
                    "--split",
                    split,
                ]
                main([*command, "--out", str(out)])
                assert json.loads(capsys.readouterr().out)["num_texts"] == len(
                    entries_of_split(example_sets[name], split)
                )
                file = {"test": "-m", "test-mismatched": "-mm"}[split] if name == "mnli" else ""
                header, *lines = (out / f"{task.folder}{file}.tsv").read_text().splitlines()
                assert header == "index\tprediction"
                assert [line.split("\t")[0] for line in lines] == list(
                    map(str, range(len(entries_of_split(example_sets[name], split))))
                )
                assert not task.classes or {line.split("\t")[1] for line in lines} <= set(
                    task.classes
                )


@pytest.mark.parametrize("name", example.SETS)
def test_recipes_have_the_published_numbers_and_a_loss_of_each_output(
    name, example_sets, tiny_processor
):
    """The table gives learning rates, batch sizes of GLUE, and CIFAR's size and transform."""
    spec = spec_of(name)
    (run,) = spec.fine_tuning
    assert run.optimizer.lr in (1e-5, 2e-5)
    if name.startswith("cifar"):
        assert (run.image_size, run.data.profile) == (224, "official-pretrain")
    else:
        assert run.batch_size in (16, 32)
    config = replace(SHAPES_MODEL, heads=run.model.heads)
    model = example.BridgeTower(config, OWN)
    outputs = torch.randn(5, {"cifar10": 10, "cifar100": 100, "stsb": 1, "mnli": 3}.get(name, 2))
    names = outputs.shape[1] > 1
    labels = torch.tensor([0, 1, 0, 1, 1] if names else [0.5, 4.0, 1.0, 2.0, 3.0])
    loss, _ = spec.module(model, run.task).loss(outputs, labels)
    assert loss == (
        F.cross_entropy(outputs, labels) if names else F.mse_loss(outputs[:, 0], labels)
    )
    width = (
        SHAPES_MODEL.vision.hidden_size
        if name.startswith("cifar")
        else SHAPES_MODEL.text.hidden_size
    )
    assert model.head(name)(torch.zeros(2, width)).shape == (2, outputs.shape[1])
