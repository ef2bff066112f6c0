"""Images of prepared sets: of which splits and kinds, and the second one of a pair."""

from pathlib import Path

import pytest
import torch

import asked
from bridgetower.data.config import DataConfig
from bridgetower.data.prepared import PreparedImages
from bridgetower.data.schema import SCHEMAS
from bridgetower.processor import Processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return asked.write_set(tmp_path_factory.mktemp("nlvr2"), "nlvr2")


@pytest.mark.parametrize("cache", [False, True])
def test_both_pictures_of_a_pair(folder: Path, tiny_processor: Processor, cache: bool) -> None:
    pictures = PreparedImages(
        DataConfig(folders=(str(folder),), cache=cache), "train", tiny_processor, schema=SCHEMAS["nlvr2"]
    )
    for _ in range(2):
        for column, colour in (("image", asked.COLOURS[3]), ("image_2", asked.COLOURS[2])):
            assert torch.equal(pictures.pixels(3, column), tiny_processor.resize(asked.png(colour)))
            assert pictures.image_bytes(3, column) == asked.png(colour)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(pictures.views([3], generator, "image_2"), tiny_processor.images([asked.png(asked.COLOURS[2])]))


def test_several_splits_and_their_digests(folder: Path, tiny_processor: Processor) -> None:
    data = DataConfig(folders=(str(folder),))
    both = PreparedImages(data, ("train", "validation"), tiny_processor, schema=SCHEMAS["nlvr2"])
    assert len(both) == 13
    assert both.image_ids[8] == "validation-0-0"
    assert both.digests().keys() == {str(folder / "train.parquet"), str(folder / "validation.parquet")}
    assert both.entries_of(8) == list(both.entries())[8]


def test_another_kind(folder: Path, tiny_processor: Processor) -> None:
    with pytest.raises(ValueError, match=r"is a set of kind nlvr2; use a set of kind vqa"):
        PreparedImages(DataConfig(folders=(str(folder),)), "train", tiny_processor, schema=SCHEMAS["vqa"])


def test_sets_that_are_only_trained_on(folder: Path, tiny_processor: Processor) -> None:
    data = DataConfig(folders=(str(folder),), train_only=(str(folder),), repeats=(1, 3))
    both = PreparedImages(data, ("train", "validation"), tiny_processor, schema=SCHEMAS["nlvr2"])
    assert len(both) == 13 + 8
    assert list(both.image_ids[13:]) == list(both.image_ids[:8])
    places = both.places(torch.tensor([1] * 13 + [2, 0] * 4))
    assert places[:13].tolist() == [[image, 0] for image in range(13)]
    assert places[13:19].tolist() == [[13, 0], [13, 1]] * 3
    assert places[:, 0].bincount().tolist() == [1] * 13 + [6, 0] * 3 + [6]
    assert len(PreparedImages(data.as_evaluated(), "validation", tiny_processor, schema=SCHEMAS["nlvr2"])) == 5
    with pytest.raises(ValueError, match="expected one positive number each"):
        DataConfig(folders=(str(folder),), train_only=(str(folder),), repeats=(1,))
