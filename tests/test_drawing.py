"""Images written as their names say, and texts that fit."""

import pytest
from PIL import Image

from bridgetower.drawing import shortened, write_image


def test_written_as_the_name_says(tmp_path):
    image = Image.new("RGB", (4, 4))
    write_image(tmp_path / "a.jpg", image)
    assert Image.open(tmp_path / "a.jpg").format == "JPEG"
    with pytest.raises(ValueError, match=r"a\.txt has no suffix of a kind of images; give a name such as"):
        write_image(tmp_path / "a.txt", image)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]


def test_a_line_is_cut_to_its_length():
    assert shortened("a dog\n and cats", 12) == "a dog and c…"
    assert shortened("a dog", 5) == "a dog"
