"""The verbs of the downstream heads: JSON lines for scripts, a table for readers, one line for user errors."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bridgetower import cli
from bridgetower.predictor import load
from bridgetower_demo.folder import FOLDER, answering_model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{colour}.png" for colour in ("red", "blue")]
    for path in paths:
        Image.new("RGB", (24, 24), path.stem).save(path)
    return list(map(str, paths))


def rows_of(choices: list[Any]) -> list[dict[str, Any]]:
    return [vars(choice) for choice in choices]


def test_answer(run: Callable[..., list[Any]], answering_checkpoint: Path, files: list[str]) -> None:
    questions = ("what colour?", "red?")
    rows = run("answer", answering_checkpoint, "--images", *files, "--questions", *questions, "--top", 2)
    expected = load(answering_checkpoint).answer(files, questions, top=2)
    assert rows == [
        {"image": file, "question": question, "answers": rows_of(choices)}
        for file, question, choices in zip(files, questions, expected, strict=True)
    ]


def test_the_word_demo_is_its_model_for_questions(
    run: Callable[..., list[Any]],
    refused: Callable[..., str],
    answering_checkpoint: Path,
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("--images", files[0], "--questions", "what colour?")
    assert "there is no bridgetower-demo/runs/bridgetower-0-answers/last here" in refused("answer", "demo", *asked)
    shutil.copytree(answering_checkpoint, answering_model(FOLDER))
    assert run("answer", "demo", *asked) == run("answer", answering_checkpoint, *asked)


def test_entail(run: Callable[..., list[Any]], answering_checkpoint: Path, files: list[str]) -> None:
    (row,) = run("entail", answering_checkpoint, "--images", files[0], "--statements", "a red bar")
    expected = load(answering_checkpoint).entail(files[0], "a red bar")
    assert row == {"image": files[0], "statement": "a red bar", "judgements": rows_of(expected)}


def test_reason(run: Callable[..., list[Any]], answering_checkpoint: Path, files: list[str]) -> None:
    pictures = ("--images", files[0], "--images-2", files[1])
    (row,) = run("reason", answering_checkpoint, *pictures, "--statements", "both are red")
    expected = load(answering_checkpoint).reason(files[0], files[1], "both are red")
    given = {"image": files[0], "image_2": files[1], "statement": "both are red"}
    assert row == given | {"judgements": rows_of(expected)}


def test_a_table_on_a_terminal(
    run: Callable[..., list[Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    answering_checkpoint: Path,
    files: list[str],
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    command = ["answer", str(answering_checkpoint), "--images", files[0], "--questions", "what colour?", "--top", "1"]
    (row,) = run(*command, "--json")
    cli.main(command)
    shown = capsys.readouterr().out
    (answer,) = row["answers"]
    assert f"{answer['label']}  {answer['probability']:.3f}" in shown
    assert "┃" in shown


def test_one_image_with_several_questions(
    run: Callable[..., list[Any]], answering_checkpoint: Path, files: list[str]
) -> None:
    asked = ("--questions", "what?", "what colour is it?")
    rows = run("answer", answering_checkpoint, "--images", files[0], *asked)
    both = run("answer", answering_checkpoint, "--images", files[0], files[0], *asked)
    assert [(row["image"], row["question"]) for row in rows] == [(files[0], "what?"), (files[0], "what colour is it?")]
    labels = [[[one["label"] for one in row["answers"]] for row in found] for found in (rows, both)]
    assert labels[0] == labels[1]


def test_errors(
    refused: Callable[..., str], tiny_checkpoint: Path, answering_checkpoint: Path, files: list[str]
) -> None:
    given = ("--images", *files, "--questions", "what?", "how?", "who?")
    assert "no vqa head (it has mlm, itm, itc)" in refused("answer", tiny_checkpoint, *given)
    assert "2 images and 3 texts" in refused("answer", answering_checkpoint, *given)
    long = ("--images", files[0], "--statements", "a red bar " * 20)
    assert "--truncate" in refused("entail", answering_checkpoint, *long)
