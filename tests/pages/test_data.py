"""The commands of docs/data.md about published sets run on small copies."""

from pathlib import Path

from shell_commands import commands

from bridgetower import cli
from helpers import published_sets

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
SETS = ("coco", "sbu", "vqav2", "nlvr2")


def test_every_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in SETS:
        getattr(published_sets, f"write_{name}_arrow")(tmp_path / "arrows")
    for command in commands(PAGE):
        cli.main(command)
    assert {path.name for path in (tmp_path / "data").iterdir()} == set(SETS)
    assert "<h1>vqav2</h1>" in Path("vqav2.html").read_text()
