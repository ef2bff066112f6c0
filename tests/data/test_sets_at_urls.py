"""Prepared sets in an object store, of which the tests have a real server: the same batches as from a disk."""

from pathlib import Path

import pytest
import torch

from bridgetower.data.batch import StepSampler
from bridgetower.data.captions import CaptionImages, CaptionPairs
from bridgetower.data.config import DataConfig
from bridgetower.data.prepared_set import PreparedSet
from bridgetower.processor import Processor, load_items
from stores import Store


@pytest.fixture
def url(store: Store, tiny_dataset: Path) -> str:
    return store.upload(tiny_dataset, "bucket/set")


def test_images_and_examples_are_those_of_the_folder(url: str, tiny_dataset: Path) -> None:
    there, here = (PreparedSet(place, ["train", "test"]) for place in (url, tiny_dataset))
    rows = list(here.scan())
    assert list(there.scan()) == there.examples(range(len(rows))) == rows
    numbers = [row["images"][0] for row in rows]
    assert there.images(numbers) == here.images(numbers)


def test_batches_of_workers_are_those_of_the_folder(url: str, tiny_dataset: Path, tiny_processor: Processor) -> None:
    pixels = []
    for place, workers in ((url, 1), (str(tiny_dataset), 0)):
        pairs = CaptionPairs(CaptionImages(DataConfig(folders=(place,)), "train", tiny_processor), None)
        sampler = StepSampler(len(pairs), batch_size=4, micro_batches=1, steps=range(4), seed=3)
        batches = list(load_items(pairs.__getitem__, sampler, num_workers=workers))
        pixels.append(torch.cat([batch.pixel_values for batch in batches]))
    assert torch.equal(*pixels)


def test_requests_that_fail_are_made_again(url: str, store: Store, tiny_dataset: Path) -> None:
    expected = PreparedSet(tiny_dataset, ["train"]).images(range(27))
    store.unreliable(0.1)
    assert PreparedSet(url, ["train"]).images(range(27)) == expected
    with pytest.raises(FileNotFoundError, match=r"no dataset\.json in s3://bucket/other"):
        PreparedSet("s3://bucket/other", ["train"])
