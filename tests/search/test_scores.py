"""Scores of pairs are those of the model for every kind of source. Interrupted runs go on."""

import json

import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import torch

from bridgetower.inference.config import ScoreConfig
from bridgetower.inference.predictor import load
from bridgetower.inference.vector_files import embed_source
from helpers.sources import SOURCE_CAPTIONS, SOURCE_NAMES


@pytest.fixture
def score(predictor, tmp_path):
    def call(source, model=predictor, **settings):
        report = embed_source(source, tmp_path / "s.parquet", model, ScoreConfig(**settings))
        return report, pq.read_table(tmp_path / "s.parquet").to_pylist()

    return call


@pytest.fixture(scope="module")
def expected_scores(predictor, shapes_folder):
    """Scores and cosines of all images with all captions."""
    images = [shapes_folder / f"{name}.png" for name in SOURCE_NAMES]
    cosines = predictor.embed_images(images) @ predictor.embed_texts(SOURCE_CAPTIONS).T
    return predictor.match(images, SOURCE_CAPTIONS, all_pairs=True), cosines


def numbers(rows, name):
    return torch.tensor([row[name] for row in rows], dtype=torch.float32)


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("table.csv", ["table.csv"] * 5),
        ("bytes.parquet", ["bytes.parquet"] * 5),
        ("shards", ["shard-0.tar"] * 3 + ["shard-1.tar"] * 2),
        ("folder", [f"{name}.png" for name in SOURCE_NAMES]),
    ],
)
def test_scores_are_those_of_the_model(kind, file, score, source_paths, expected_scores):
    report, rows = score(source_paths[kind], batch_size=2)
    assert (report.vectors, report.bad) == (5, 0)
    assert list(rows[0]) == ["id", "text", "file", "row", "score", "cosine"]
    assert [row["text"] for row in rows] == list(SOURCE_CAPTIONS)
    assert [row["file"] for row in rows] == file
    seen = [file[:number].count(name) for number, name in enumerate(file)]
    assert [row["row"] for row in rows] == seen
    for name, values in zip(("score", "cosine"), expected_scores, strict=True):
        torch.testing.assert_close(numbers(rows, name), values.diagonal(), atol=1e-5, rtol=0)
        assert (
            numbers(rows, name) - values[0]
        ).abs().max() > 1e-3  # the control: another image with these texts


def test_captions_of_a_row_and_rows_that_cannot_be_used(
    score, source_paths, expected_scores, tmp_path
):
    table = tmp_path / "more.jsonl"
    folder = source_paths["folder"]
    lines = [
        {
            "id": "a",
            "image": f"{folder}/00.png",
            "caption": [SOURCE_CAPTIONS[1], SOURCE_CAPTIONS[4]],
        },
        {"id": "none", "image": f"{folder}/00.png"},
        {"id": "gone", "image": "gone.png", "caption": "a"},
        {"id": "b", "image": f"{folder}/02.png", "caption": SOURCE_CAPTIONS[0]},
    ]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report, rows = score(table, max_errors=2)
    assert (report.bad, report.problems[0]) == (2, "'none': it has no text")
    assert [(row["id"], row["row"]) for row in rows] == [("a", 0), ("a", 0), ("b", 3)]
    for name, values in zip(("score", "cosine"), expected_scores, strict=True):
        selected = values[[0, 0, 2], [1, 4, 0]]
        torch.testing.assert_close(numbers(rows, name), selected, atol=1e-5, rtol=0)


def test_a_run_that_was_cut_off_goes_on(
    score, source_paths, interrupt, encoded_batches, expected_scores
):
    interrupt(3, lambda: score(source_paths["table.csv"], batch_size=1, commit_seconds=0))
    before = sum(encoded_batches)
    _, rows = score(source_paths["table.csv"], batch_size=1, commit_seconds=0)
    assert (before, sum(encoded_batches)) == (2, 5)
    torch.testing.assert_close(
        numbers(rows, "cosine"), expected_scores[1].diagonal(), atol=1e-5, rtol=0
    )


def test_models_that_lack_a_head(score, source_paths, tiny_checkpoint, expected_scores):
    model = load(tiny_checkpoint, device="cpu")
    heads = model.model.itm_head, model.model.itc_head
    for number, name in enumerate(("score", "cosine")):
        model.model.itm_head, model.model.itc_head = (
            (heads[0], None) if number == 0 else (None, heads[1])
        )
        _, rows = score(source_paths["table.csv"], model)
        assert list(rows[0]) == ["id", "text", "file", "row", name]
        torch.testing.assert_close(
            numbers(rows, name), expected_scores[number].diagonal(), atol=1e-5, rtol=0
        )
    model.model.itc_head = None
    with pytest.raises(ValueError, match=r"this model has no .* head"):
        score(source_paths["table.csv"], model)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_rows_are_the_same_in_every_format(score, predictor, source_paths, tmp_path, suffix):
    _, expected_rows = score(source_paths["table.csv"])
    out = tmp_path / f"scores{suffix}"
    embed_source(source_paths["table.csv"], out, predictor, ScoreConfig())
    if suffix == ".jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        rows = pacsv.read_csv(out).to_pylist()
    assert rows == expected_rows


def test_command(run, refused, source_paths, predictor, tmp_path):
    (report,) = run(
        "score",
        source_paths["table.csv"],
        "--model",
        predictor.source,
        "--out",
        tmp_path / "s.parquet",
    )
    assert (report["pairs"], report["out"]) == (5, str(tmp_path / "s.parquet"))
    message = refused(
        "score", predictor.source, source_paths["table.csv"], "--out", tmp_path / "s.npy"
    )
    assert "has no suffix of scores; expected one of .csv, .jsonl, .parquet" in message
