"""Images with a true and several false captions: pure functions of their key, never one of the own as false."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bridgetower.data.batch import BatchKey
from bridgetower.data.captions import CaptionImages, RankingPairs
from bridgetower.data.config import DataConfig
from bridgetower.processor import Processor
from rows import record, write_set


@pytest.fixture
def images(tiny_dataset: Path, tiny_processor: Processor) -> CaptionImages:
    return CaptionImages(DataConfig(folders=(str(tiny_dataset),)), "train", tiny_processor)


def texts(pairs: RankingPairs, *key: Any) -> list[str]:
    batch = pairs[BatchKey(*key)]
    return [pairs.images.processor.decode(row) for row in batch.input_ids]


def test_the_true_caption_comes_first(images: CaptionImages) -> None:
    pairs = RankingPairs(images, false_texts=3)
    assert len(pairs) == images.num_examples
    found, chosen = texts(pairs, (4, 0), 7), images.pairs()[[4, 0]].tolist()
    assert len(found) == 8
    assert [found[0], found[4]] == [row["entry"] for row in images.examples([number for _, number in chosen])]
    identities = images.chosen([], torch.Generator(), [image for image, _ in chosen])[2]
    assert torch.equal(pairs[BatchKey((4, 0), 7)].image_index, identities)


def test_false_captions_are_of_other_images(images: CaptionImages) -> None:
    pairs = RankingPairs(images, false_texts=15)
    seen = set()
    for seed in range(20):
        image = int(images.pairs()[seed, 0])
        false = texts(pairs, (seed,), seed)[1:]
        assert not set(false) & set(images.captions([image])[0])
        seen |= set(false)
    assert len(seen) > len(images)  # any of them, and not only the first caption of an image


def test_batch_is_a_function_of_its_key(images: CaptionImages) -> None:
    images.config = replace(images.config, augmentation="affine")
    pairs, key = RankingPairs(images, false_texts=2), BatchKey((3, 0), 17)
    first = pairs[key]
    torch.manual_seed(99)
    again, other = pairs[key], pairs[BatchKey((3, 0), 18)]
    assert torch.equal(first.pixel_values, again.pixel_values)
    assert torch.equal(first.input_ids, again.input_ids)
    assert (first.ids, first.seed) == (again.ids, again.seed)
    assert not torch.equal(first.pixel_values, other.pixel_values)


def captioned(folder: Path, processor: Processor, captions: Sequence[str]) -> CaptionImages:
    write_set(folder / "set", {"train": [record(number, entries=[text]) for number, text in enumerate(captions)]})
    return CaptionImages(DataConfig(folders=(str(folder / "set"),)), "train", processor)


def test_false_captions_are_of_images_with_other_captions(tmp_path: Path, tiny_processor: Processor) -> None:
    words = ["red", "blue", "red", "bar", "red", "blue"]
    pairs = RankingPairs(captioned(tmp_path, tiny_processor, words), false_texts=60)
    for example, word in enumerate(words):
        true, *false = texts(pairs, (example,), example)
        assert true == word
        assert {other: false.count(other) > 5 for other in false} == dict.fromkeys(set(words) - {word}, True)


@pytest.mark.parametrize("count", [1, 3])
def test_one_image_or_the_same_captions_have_no_false_ones(
    count: int, tmp_path: Path, tiny_processor: Processor
) -> None:
    images = captioned(tmp_path, tiny_processor, ["red"] * count)
    with pytest.raises(ValueError, match="train has no two images with different captions"):
        RankingPairs(images, false_texts=1)
