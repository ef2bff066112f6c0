"""The images that evaluations of captions are tested with."""

import pytest

from helpers.sets import caption_images


@pytest.fixture
def images(tiny_dataset, tiny_processor):
    return caption_images(tiny_dataset, "test", tiny_processor)
