"""Lines of text that fit, and pictures written as their names say."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bridgetower.text_drawing import INK, PAPER, Pen, write_image


def drawn(text: str, width: float) -> tuple[int, int]:
    """First and last column that a line touches."""
    picture = Image.new("RGB", (400, 40), PAPER)
    Pen(picture).line(text, 10, 30, width=width, size=16)
    columns = np.nonzero((np.asarray(picture) != PAPER).any(axis=(0, 2)))[0]
    return int(columns.min()), int(columns.max())


def test_a_line_is_cut_to_its_width() -> None:
    short, long = drawn("a dog", 380), drawn("a dog and many cats\nin the snow " * 20, 120)
    assert short[0] == pytest.approx(11, abs=2)
    assert 110 <= long[1] - long[0] <= 121
    assert drawn("Ωж→", 380)[1] > 30


def test_ink_is_dark_on_paper() -> None:
    assert sum(PAPER) - sum(INK) > 600


def test_written_as_the_name_says(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4))
    write_image(tmp_path / "a.jpg", picture)
    assert Image.open(tmp_path / "a.jpg").format == "JPEG"
    with pytest.raises(ValueError, match=r"a\.txt has no suffix of a kind of images; give a name such as"):
        write_image(tmp_path / "a.txt", picture)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]
