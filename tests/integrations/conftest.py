"""A model whose vectors of texts, images and pairs can be compared, and a few images."""

from dataclasses import replace

import pytest


@pytest.fixture(scope="session")
def comparable_checkpoint(tmp_path_factory, tiny_dataset):
    """`tiny_checkpoint` with contrastive heads for texts, images and pairs."""
    from helpers.shapes import SHAPES_MODEL, write_tiny_checkpoint

    model = replace(SHAPES_MODEL, heads=replace(SHAPES_MODEL.heads, itc="fused"))
    return write_tiny_checkpoint(tiny_dataset, tmp_path_factory.mktemp("comparable"), model)


@pytest.fixture(scope="module")
def comparable_predictor(comparable_checkpoint):
    """`comparable_checkpoint` as users load it, anew for each module because some train it."""
    from bridgetower.inference.predictor import load

    return load(comparable_checkpoint, device="cpu")


@pytest.fixture(scope="session")
def image_files(tmp_path_factory):
    """Files of three images."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (30, 24), colour).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(3)]
