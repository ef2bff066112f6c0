"""Classification by labels: as open_clip computes it, and the same in Python, on the command line and served."""

import csv
from pathlib import Path

import pytest
import torch

from bridgetower.cli import main
from bridgetower.inference.items import TEMPLATES, prompts_of
from bridgetower.inference.predictor import load
from helpers.servers import PNGS, URIS, error_of, running_client

LABELS = ["red circle", "blue bar", "a {bar}"]


def probabilities(choices):
    rows = [choice if isinstance(choice, dict) else vars(choice) for choice in choices]
    assert [row["probability"] for row in rows] == sorted(
        (row["probability"] for row in rows), reverse=True
    )
    return {row["label"]: pytest.approx(row["probability"], abs=1e-5) for row in rows}


@pytest.mark.parametrize("templates", [TEMPLATES, ["a {} on the ground", "some {}"]])
def test_labels_are_means_over_templates(predictor, templates):
    weights = []
    for label in LABELS:
        vectors = predictor.embed_texts([template.replace("{}", label) for template in templates])
        mean = vectors.mean(dim=0)
        weights.append(mean / mean.norm())
    logits = (
        predictor.embed_images(PNGS)
        @ torch.stack(weights).T
        / predictor.model.itc_head.temperature.item()
    )
    results = predictor.classify(PNGS, labels=LABELS, templates=templates)
    for choices, expected in zip(results, logits.softmax(dim=-1).tolist(), strict=True):
        assert probabilities(choices) == dict(zip(LABELS, expected, strict=True))
    assert [
        choice.label
        for choice in predictor.classify(PNGS[0], labels=LABELS, templates=templates, top=2)
    ] == [choice.label for choice in results[0][:2]]


def test_options_reach_images_and_labels(predictor):
    labels = ["bar " * 99, "red circle"]
    results = predictor.classify(PNGS, labels=labels, batch_size=1, truncate=True)
    # What is cut off does not count.
    limit = predictor.processor.config.max_length
    expected = predictor.classify(PNGS, labels=["bar " * limit, labels[1]], truncate=True)
    for choices, others in zip(results, expected, strict=True):
        assert [choice.probability for choice in choices] == pytest.approx(
            [choice.probability for choice in others], abs=1e-5
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": ["a"]}, r"labels are \['a'\]; expected two or more"),
        ({"labels": ["a", " "]}, "expected two or more, none empty"),
        ({"labels": ["a", "b", "a"]}, "labels has 'a' twice"),
        (
            {"labels": LABELS, "templates": []},
            r"templates are \[\]; expected a list of one or more",
        ),
        (
            {"labels": LABELS, "templates": ["a photo"]},
            "template 'a photo' has 0 places for a label; expected one {}",
        ),
        ({"labels": LABELS, "texts": ["a"]}, "labels are compared with images alone"),
        ({"labels": LABELS, "images": None}, "labels are compared with images alone"),
        ({"labels": LABELS, "images": [None]}, "image 0"),
        ({"labels": ["a", "b " * 99]}, "truncate"),
        ({}, "no classification head .*train classification; or give labels, which need none"),
    ],
)
def test_refusals(predictor, arguments, message):
    with pytest.raises(ValueError, match=message):
        predictor.classify(**{"images": PNGS[:1], **arguments})


def test_prompts_of_a_label_stand_together():
    assert prompts_of(["{}", "b"], ["{}", "the {}"]) == ["{}", "the {}", "b", "the b"]


class TestCommand:
    @pytest.fixture
    def photos(self, tmp_path):
        (tmp_path / "photos").mkdir()
        for number, content in enumerate(PNGS):
            (tmp_path / "photos" / f"{number}.png").write_bytes(content)
        return tmp_path / "photos"

    def test_a_folder_files_and_a_table(self, run, capsys, predictor, photos):
        expected = [probabilities(choices) for choices in predictor.classify(PNGS, labels=LABELS)]
        files = sorted(photos.glob("*.png"))
        with (photos.parent / "table.csv").open("w", newline="") as file:
            csv.writer(file).writerows(
                [["image", "caption"], *([f"photos/{file.name}", "a"] for file in files)]
            )
        for arguments in ([photos], ["--images", *files], [photos.parent / "table.csv"]):
            rows = run("classify", predictor.source, *arguments, "--labels", *LABELS)
            assert [probabilities(row["classes"]) for row in rows] == expected
            assert [Path(row["image"]).name for row in rows] == ["0.png", "1.png", "2.png"]
        (row, *_) = run(
            "classify",
            predictor.source,
            photos,
            "--labels",
            *LABELS,
            "--templates",
            "a {}",
            "--top",
            1,
        )
        (best, *_) = predictor.classify(PNGS[0], labels=LABELS, templates=["a {}"])
        assert probabilities(row["classes"]) == {best.label: best.probability}
        (photos / "1.png").write_bytes(b"no image")
        command = ["classify", predictor.source, str(photos), "--labels", "a", "b"]
        with pytest.raises(SystemExit):
            main(command)
        captured = capsys.readouterr()
        assert len(captured.out.splitlines()) == 2
        assert "1 bad item, allowed are 0 (--max-errors" in captured.err
        assert (
            "the classes of the others are printed: '1.png': it cannot be read as an image"
            in captured.err
        )
        rows = run(*command, "--max-errors", 1)
        assert [Path(row["image"]).name for row in rows] == ["0.png", "2.png"]
        long_label = ["--labels", "b " * 99, "a", "--truncate", "--max-errors", 1]
        assert len(run("classify", predictor.source, photos, *long_label)) == 2

    def test_bad_arguments(self, refused, predictor, photos):
        for arguments, words in (
            (["--images", photos, "--max-errors", 1], "no labels are given"),
            ([photos], "has no classification head"),
            ([photos, "--images", photos, "--labels", "a", "b"], "expected one of them"),
            (["--labels", "a", "b"], "nothing to classify"),
        ):
            assert words in refused("classify", predictor.source, *arguments)


def test_served(predictor, answering_checkpoint):
    with running_client(predictor, max_items=20) as client:

        def post(**body):
            return client.post("/v1/classify", json=body)

        answer = post(images=URIS, labels=LABELS).json()
        expected = predictor.classify(PNGS, labels=LABELS)
        assert [probabilities(row["classes"]) for row in answer["data"]] == list(
            map(probabilities, expected)
        )
        assert [row["index"] for row in answer["data"]] == [0, 1, 2]
        assert answer["usage"]["total_tokens"] > 0
        (row,) = post(images=URIS[0], labels=LABELS, templates=["a {}"], top=1).json()["data"]
        (best, *_) = predictor.classify(PNGS[0], labels=LABELS, templates=["a {}"])
        assert probabilities(row["classes"]) == {best.label: best.probability}
        for body, words in (
            ({"images": URIS[:1], "templates": ["{}"]}, "templates are for labels"),
            ({"images": URIS[:1], "labels": ["a", "b " * 99]}, 'send "truncate": true'),
            ({"images": URIS[:1]}, "no classification head"),
        ):
            assert words in error_of(post(**body), 400)["message"]
        assert (
            "21 items, the limit is 20"
            in error_of(post(images=URIS[:1], labels=list("abcde")), 413)["message"]
        )
    with running_client(load(answering_checkpoint, device="cpu")) as client:
        error = error_of(
            client.post("/v1/classify", json={"images": URIS, "labels": ["a", "b"]}), 400
        )
    assert "no contrastive (ITC) head" in error["message"]
