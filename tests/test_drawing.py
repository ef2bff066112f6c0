"""Images written as their names say, texts that fit, and the picture of an explanation."""

import numpy as np
import pytest
import torch
from PIL import Image

from bridgetower.drawing import require_image_name, shortened_line, write_image
from bridgetower.inference.attention import Explanation, draw_explanation, heat


def test_written_as_the_name_says(tmp_path):
    image = Image.new("RGB", (4, 4))
    write_image(tmp_path / "a.jpg", image)
    assert Image.open(tmp_path / "a.jpg").format == "JPEG"
    for name in ("a.txt", "a.psd", "a"):  # Pillow reads .psd, but does not write it
        with pytest.raises(
            ValueError, match=rf"{name} has no suffix of a kind of images; give a name such as"
        ):
            require_image_name(tmp_path / name)
    require_image_name(tmp_path / "A.PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]


def test_a_line_is_cut_to_its_length():
    assert shortened_line("a dog\n and cats", 12) == "a dog and c…"
    assert shortened_line("a dog", 5) == "a dog"


@pytest.fixture
def gradient_view():
    return Image.linear_gradient("L").convert("RGB").resize((480, 480))


def explanation(view, num_words, *, layers=1, probability=0.5):
    maps = torch.full((layers, num_words, 3, 3), 0.05)
    for word in range(num_words):
        maps[:, word, word % 3, word % 2] = 0.6
    return Explanation(
        text=" ".join(["word"] * num_words),
        words=("word",) * num_words,
        maps=maps,
        prefix_shares=torch.full((layers, num_words), 0.25),
        probability=probability,
        view=view,
    )


def test_glows_where_the_attention_is(gradient_view):
    values = torch.zeros(3, 3)
    values[0, 2] = 1
    pixels = np.asarray(heat(gradient_view, values)).astype(float).sum(axis=2)
    third = gradient_view.width // 3
    means = pixels.reshape(3, third, 3, third).mean(axis=(1, 3))
    assert means.argmax() == 2
    assert means[0, 2] > 1.5 * means[2, 0]
    dark = np.asarray(heat(gradient_view, torch.zeros(3, 3))).astype(float)
    assert dark.max() < 0.5 * 255


@pytest.mark.filterwarnings("error")
def test_bands_of_words_and_rows_of_layers(gradient_view):
    few = draw_explanation(explanation(gradient_view, 8))
    many = draw_explanation(explanation(gradient_view, 9, probability=None))
    side = few.width / 8.6
    assert 5 * side < many.width < 7 * side
    assert many.height > few.height + 1.2 * side
    assert draw_explanation(explanation(gradient_view, 8, layers=2)).height > few.height + side
