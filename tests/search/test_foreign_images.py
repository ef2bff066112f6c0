"""The benchmark of foreign images finds images by the first line of their text files."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "foreign_images.py"


def test_stages_and_chance(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = ("a red flag\nde.utf8=eine rote Fahne", "a red flag", "a blue star", "", None, "a green tree")
    for number, caption in enumerate(captions):  # the second says what the first says, two say nothing
        Image.new("RGB", (20, 20), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
        if caption is not None:
            (tmp_path / f"{number}.txt").write_text(caption)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path), "--model", str(tiny_checkpoint)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["stage"] for row in rows] == ["nearest vectors", "64 reranked", "chance"]
    assert {row["images"] for row in rows} == {3}
    assert all(0 <= row["recall_at_1"] <= row["recall_at_10"] == 1 for row in rows)
    assert rows[-1]["recall_at_1"] == pytest.approx(1 / 3)
