"""Results of commands in a file: the rows that would be printed."""

import csv
import json

import pyarrow.parquet as pq
import pytest
from PIL import Image


@pytest.fixture
def colour_photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "white")):
        Image.new("RGB", (24, 24), colour).save(f"{name}.png")
    return ["a.png", "b.png", "c.png"]


def read_result_rows(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_answers_and_matches_are_written(
    run, colour_photos, answering_checkpoint, tiny_checkpoint, tmp_path, suffix
):
    commands = {
        "answer": [answering_checkpoint, "--images", *colour_photos, "--questions", "what colour?"],
        "match": [tiny_checkpoint, "--images", *colour_photos, "--texts", "a wall", "--all-pairs"],
    }
    for command, arguments in commands.items():
        printed = run(command, *arguments)
        out = tmp_path / f"{command}{suffix}"
        assert run(command, *arguments, "--out", out) == [{"out": str(out), "rows": 3}]
        rows = read_result_rows(out)
        if suffix != ".csv":
            assert rows == printed
            continue
        assert [row["image"] for row in rows] == colour_photos
        for row, expected in zip(rows, printed, strict=True):
            if command == "match":
                assert float(row["score"]) == expected["score"]
            else:
                assert json.loads(row["answers"]) == expected["answers"]
                assert row["label"] == expected["answers"][0]["label"]
                assert float(row["probability"]) == expected["answers"][0]["probability"]


def test_bad_files_are_named_after_the_others_are_written(
    run, colour_photos, tiny_checkpoint, tmp_path, capsys
):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (24, 24), "red").save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"no image")
    out = tmp_path / "classes.jsonl"
    command = ["classify", tiny_checkpoint, folder, "--labels", "red", "blue", "--out", out]
    with pytest.raises(SystemExit):
        run(*command)
    message = capsys.readouterr().err
    assert "bad.png" in message
    assert f"the classes of the others are in {out}" in message
    (row,) = read_result_rows(out)
    assert row["image"] == "good.png"
    run(*command, "--max-errors", 1)


def test_other_endings_are_refused_before_a_model_is_read(refused, colour_photos):
    message = refused(
        "match", "no-model", "--images", *colour_photos, "--texts", "a", "--out", "out.xlsx"
    )
    assert message.endswith("expected a name that ends in .csv, .jsonl, .parquet")
