"""Made-up photos and a small trained tokenizer for the tests of preprocessing."""

import numpy as np
import pytest
from PIL import Image

from bridgetower.processor import ProcessorConfig, train_tokenizer

CAPTIONS = [
    "A dog runs on the grass.",
    "Two dogs are running across a green field",
    "A man in a red jacket rides a bicycle down the street.",
    "Three children play football on the beach at sunset.",
    "The cat sleeps on the red sofa, and the dog watches.",
] * 3


@pytest.fixture(scope="session")
def photo():
    def make(height, width):
        rng = np.random.default_rng(height * 10_000 + width)
        coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
        smooth = np.asarray(
            Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        ).astype(int)
        smooth[height // 3 : height // 2, width // 4 :] //= 4
        return Image.fromarray(
            (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        )

    return make


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(CAPTIONS, vocab_size=320)


@pytest.fixture
def config():
    return ProcessorConfig(profile="official-pretrain", image_size=32, max_length=12, patch_size=16)
