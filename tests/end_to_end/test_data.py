"""The commands of docs/data.md about files that only miniatures stand for here; test_readme.py runs the others."""

from pathlib import Path

import pytest

import miniature_arrow
from bridgetower import cli
from pages import commands

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
WRITERS = [getattr(miniature_arrow, f"write_{name}_arrow") for name in ("coco", "sbu", "vqav2", "nlvr2")]


def test_every_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for write in WRITERS:
        write(tmp_path / "arrows")
    for command in commands(PAGE):
        cli.main(command)
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"coco", "sbu", "vqav2", "nlvr2"}
    assert "<h1>vqav2</h1>" in Path("vqav2.html").read_text()
