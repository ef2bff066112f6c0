"""The verbs of search: JSON lines for scripts, tables for readers, one line for user errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, colour in enumerate(("red", "blue", "green")):
        Image.new("RGB", (24 + number, 24), colour).save(folder / f"{colour}.png")
    return folder


class TestIndex:
    def test_makes_and_updates(
        self, run: Callable[..., list[Any]], tiny_checkpoint: Path, photos: Path, tmp_path: Path
    ) -> None:
        command = ("index", photos, "--out", tmp_path / "photos.lance", "--model", tiny_checkpoint)
        (first,) = run(*command)
        assert first.pop("seconds") > 0
        assert first == {
            "index": str(tmp_path / "photos.lance"),
            **{"pictures": 3, "added": 3, "changed": 0, "removed": 0, "reused": 0, "bad": []},
        }
        (photos / "red.png").unlink()
        (photos / "broken.png").write_text("")
        (second,) = run(*command, "--max-bad", 1, "--batch-size", 1)
        assert (second["pictures"], second["removed"]) == (2, 1)
        assert second["bad"] == ["'broken.png': it is empty (0 bytes); fetch the picture again"]

    def test_errors(
        self,
        refused: Callable[..., str],
        run: Callable[..., list[Any]],
        tiny_checkpoint: Path,
        photos: Path,
        tmp_path: Path,
    ) -> None:
        command = ("index", photos, "--out", tmp_path / "photos.lance", "--model", tiny_checkpoint)
        (photos / "broken.png").write_text("")
        assert "1 bad pictures, allowed are 0 (max_bad); the other 3 are in the index" in refused(*command)
        assert "model" in refused(*command, "--image-size", 40)
        assert "is no name for an index" in refused(
            "index", photos, "--out", tmp_path / "photos", "--model", tiny_checkpoint
        )
        assert "nowhere" in refused(
            "index", tmp_path / "nowhere", "--out", tmp_path / "photos.lance", "--model", tiny_checkpoint
        )
