"""Evaluation without training: metrics by hand and by other implementations, scores of the model, whole benchmarks."""

import json
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

from bridgetower.data.sets.custom import LabelledConfig, prepare_custom
from bridgetower.data.sets.datasets import prepare_set
from bridgetower.evaluation.class_metrics import classification_metrics
from bridgetower.evaluation.config import EvaluationOptions, RetrievalConfig
from bridgetower.evaluation.zero_shot import composition_metrics
from bridgetower.inference.predictor import load
from bridgetower.processor import open_image
from bridgetower.tasks.table import evaluate
from helpers.published_sets import SET_WRITERS, noise_jpeg
from helpers.sets import read_rows
from helpers.shapes import SHAPE_COLOURS, write_shape_pictures

TEMPLATES = ("a {}", "something {} on black", "the {} bar")


@pytest.fixture(scope="module")
def predictor(tiny_checkpoint):
    return load(tiny_checkpoint, device="cpu")


def test_top_5_as_scikit_learn_has_it():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(200, 7, generator=generator)
    labels = torch.randint(6, (200,), generator=generator)
    marks = torch.nn.functional.one_hot(labels, 7).bool()  # none is of the last class
    expected = top_k_accuracy_score(labels, scores, k=5, labels=range(7))
    assert classification_metrics(scores, marks, multi_label=False)[
        "top5_accuracy"
    ] == pytest.approx(expected)


def test_winoground_as_its_authors_define_it():
    """On all scores of three values, so with ties, which are wrong."""

    def is_right(s, first, second):
        return s[0][0] > s[first][second] and s[1][1] > s[second][first]

    score_tables = [
        torch.tensor(values, dtype=torch.float32).view(2, 2)
        for values in product(range(3), repeat=4)
    ]
    text, image = ([bool(is_right(s, *order)) for s in score_tables] for order in ((0, 1), (1, 0)))
    group = [all(both) for both in zip(text, image, strict=True)]
    assert 0 < sum(group) < sum(text)  # the control: they are not the same
    assert text != image
    metrics, by_category = composition_metrics(score_tables, ["a", *["b"] * 80])
    names = {"text_score": text, "image_score": image, "group_score": group}
    expected = {name: pytest.approx(sum(hits) / 81) for name, hits in names.items()}
    assert metrics == {**expected, "macro_group_score": pytest.approx(sum(group) / 160)}
    assert by_category == {"a": 0.0, "b": pytest.approx(sum(group) / 80)}


def test_one_image_and_any_number_of_captions():
    rows = [[[3.0, 1.0, 2.0]], [[1.0, 1.0]], [[2.0, 3.0]], [[1.0, 0.0]]]
    metrics = composition_metrics([torch.tensor(row) for row in rows], ["x", "y", "x", "z"])
    assert metrics == ({"accuracy": 0.5, "macro_accuracy": 0.5}, {"x": 0.5, "y": 0.0, "z": 1.0})


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Pictures of shapes, all in the split `test`, with their colours as classes."""
    folder = tmp_path_factory.mktemp("coloured")
    write_shape_pictures(folder)
    rows = [
        {"image": f"{n:02}.png", "label": SHAPE_COLOURS[n // 9], "split": "test"}
        for n in range(0, 45, 4)
    ]
    rows.append({"image": "44.png", "text": "no label", "split": "test"})
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_custom(
        "classification", folder / "table.jsonl", folder / "set", LabelledConfig(), progress=False
    )
    images = [folder / row["image"] for row in rows]
    labels = [row.get("label") for row in rows]
    return SimpleNamespace(set=folder / "set", images=images, labels=labels)


@pytest.mark.parametrize("benchmark", ["zero-shot", "zero-shot-matching"])
def test_classes_as_a_user_classifies_and_matches(benchmark, predictor, coloured):
    config = RetrievalConfig(batch_size=5)
    names = sorted(SHAPE_COLOURS)
    outcome = evaluate(predictor, benchmark, [coloured.set], "test", config, templates=TEMPLATES)
    if benchmark == "zero-shot":
        classified = predictor.classify(coloured.images, labels=names, templates=TEMPLATES)
        expected = torch.tensor(
            [
                [next(c.probability for c in choices if c.label == n) for n in names]
                for choices in classified
            ]
        )
    else:
        prompts = [TEMPLATES[0].format(name) for name in names]
        expected = predictor.match(coloured.images, prompts, all_pairs=True).logit().softmax(dim=1)
    probabilities = torch.tensor(
        [[row["probabilities"][name] for name in names] for row in outcome.predictions]
    )
    torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=0)
    right = [
        names[n] == label for n, label in zip(expected.argmax(dim=1), coloured.labels, strict=True)
    ]
    assert outcome.metrics["accuracy"] == pytest.approx(sum(right) / 12)
    matched = {
        name: [hit for hit, label in zip(right, coloured.labels, strict=True) if label == name]
        for name in names
    }
    assert outcome.details["by_class"] == {
        name: pytest.approx(sum(hits) / len(hits)) for name, hits in matched.items()
    }
    assert outcome.counts == {"num_examples": 13, "num_labelled": 12}


def test_command(predictor, coloured, run, refused):
    options = ("--data", coloured.set, "--templates", *TEMPLATES)
    (report,) = run("evaluate", predictor.source, "zero-shot", *options)
    outcome = evaluate(
        predictor, "zero-shot", [coloured.set], "test", RetrievalConfig(), templates=TEMPLATES
    )
    assert (report["accuracy"], report["templates"]) == (
        outcome.metrics["accuracy"],
        list(TEMPLATES),
    )
    message = refused("evaluate", predictor.source, "retrieval", *options)
    assert "templates are for zero-shot; leave them out for retrieval" in message


@pytest.mark.parametrize(
    ("name", "split"), [("winoground", "test"), ("sugarcrepe", "test"), ("aro", "relation")]
)
def test_compositions_have_the_scores_of_the_model(predictor, tmp_path, name, split):
    SET_WRITERS[name](tmp_path / "in")
    prepare_set(name, tmp_path / "in", tmp_path / "set", progress=False)
    config = RetrievalConfig(batch_size=3)
    options = EvaluationOptions(work=tmp_path / "work")
    outcome = evaluate(predictor, "compositionality", [tmp_path / "set"], split, config, options)
    rows = read_rows(tmp_path / "set", split)
    entries = {
        entry["example_id"]: (row["images"], entry) for row in rows for entry in row["entries"]
    }
    assert len(outcome.predictions) == len(entries)
    for row in outcome.predictions:
        images, entry = entries[row["id"]]
        cosines = predictor.embed_images(images) @ predictor.embed_texts(entry["captions"]).T
        torch.testing.assert_close(torch.tensor(row["itc"]), cosines, atol=1e-5, rtol=0)
        match = predictor.match(images, entry["captions"], all_pairs=True)
        torch.testing.assert_close(
            torch.tensor(row["matching"]).sigmoid(), match, atol=1e-5, rtol=0
        )
    for kind in ("itc", "matching"):
        scores = [torch.tensor(row[kind]) for row in outcome.predictions]
        labels = [entries[row["id"]][1]["label"] for row in outcome.predictions]
        expected, by_category = composition_metrics(scores, labels)
        named_metrics = {
            f"{kind}_{name}": value for name, value in {**expected, **by_category}.items()
        }
        assert named_metrics.items() <= outcome.metrics.items()
        assert outcome.details[f"{kind}_by_category"] == by_category
    if name == "aro":  # an image is the region that its box holds
        images, entry = entries["relation-3"]
        assert (
            open_image(images[0]).tobytes()
            == open_image(noise_jpeg(2)).crop((3, 1, 7, 7)).tobytes()
        )
        assert entry["captions"] == ["the 3 is on it", "it is on the 3"]
