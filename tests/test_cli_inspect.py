"""`bridgetower inspect`: JSON for scripts, tables for a reader, a page for the eye."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridgetower import cli
from bridgetower.data.datasets import prepare_set
from miniature import write_vqav2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_vqav2(tmp_path / "vqa")
    prepare_set("vqav2", tmp_path / "vqa", tmp_path / "out")
    return tmp_path / "out"


def test_json_and_page(run: Callable[..., list[Any]], folder: Path, tmp_path: Path) -> None:
    (printed,) = run("inspect", folder, "--html", tmp_path / "page.html", "--num-samples", 2, "--check")
    train = printed["splits"]["train"]
    assert (printed["name"], printed["kind"], train["images"], train["texts"]) == ("vqav2", "vqa", 7, 28)
    assert train["published"] == {"images": 82_783, "texts": 443_757, "source": "visualqa.org"}
    assert train["words"]["median"] == 6
    assert train["classes"] == {"yes/no": 14, "number": 7, "other": 7}
    assert printed["html"] == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_tables(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli.main(["inspect", str(folder)])
    text = capsys.readouterr().out
    assert "7 of 82,783" in text
    assert "8 of 107,394" in text
    assert "train: yes/no 14, number 7, other 7" in text


def test_errors(refused: Callable[..., str], tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        assert f"no dataset.json in {folder}; give the folder" in refused("inspect", folder)
