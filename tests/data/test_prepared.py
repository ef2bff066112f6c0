"""Images of prepared sets: of which splits and kinds, and the second one of a pair."""

from pathlib import Path

import pytest
import torch

import asked
from bridgetower.data.config import DataConfig
from bridgetower.data.examples import PreparedImages
from bridgetower.data.prepared_set import read_info
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
    (row,) = pictures.examples([3])
    colours = asked.COLOURS[3], asked.COLOURS[2]
    for _ in range(2):
        assert pictures.contents(row["images"]) == [asked.png(colour) for colour in colours]
        for found, colour in zip(pictures.pixels(row["images"]), colours, strict=True):
            assert torch.equal(found, tiny_processor.resize(asked.png(colour)))
    views = pictures.views(row["images"], torch.Generator().manual_seed(0))
    assert torch.equal(views, tiny_processor.images([asked.png(colour) for colour in colours]))


def test_several_splits_and_their_digests(folder: Path, tiny_processor: Processor) -> None:
    data = DataConfig(folders=(str(folder),))
    both = PreparedImages(data, ("train", "validation"), tiny_processor, schema=SCHEMAS["nlvr2"])
    assert both.num_examples == 13
    assert both.examples([8])[0]["id"] == "validation-0-0"
    assert both.digests() == {f"{folder} (train, validation)": read_info(folder).digest}
    assert both.examples(range(13)) == list(both.scan())


def test_another_kind(folder: Path, tiny_processor: Processor) -> None:
    with pytest.raises(ValueError, match=r"is a set of kind nlvr2; use a set of kind vqa"):
        PreparedImages(DataConfig(folders=(str(folder),)), "train", tiny_processor, schema=SCHEMAS["vqa"])


def test_sets_that_are_only_trained_on(folder: Path, tiny_processor: Processor) -> None:
    data = DataConfig(folders=(str(folder),), train_only=(str(folder),), repeats=(1, 3))
    both = PreparedImages(data, ("train", "validation"), tiny_processor, schema=SCHEMAS["nlvr2"])
    assert both.num_examples == 13 + 8
    assert [row["entry"] for row in both.examples(range(13, 21))] == [row["entry"] for row in both.examples(range(8))]
    assert both.contents([both.examples([13])[0]["images"][0]]) == both.contents([both.examples([0])[0]["images"][0]])
    assert both.repeated(torch.arange(21)).bincount().tolist() == [1] * 13 + [3] * 8
    assert both.sets_of(torch.tensor([0, 12, 13, 20])).tolist() == [0, 0, 1, 1]
    assert PreparedImages(data.as_evaluated(), "validation", tiny_processor, schema=SCHEMAS["nlvr2"]).num_examples == 5
    with pytest.raises(ValueError, match="expected one positive number each"):
        DataConfig(folders=(str(folder),), train_only=(str(folder),), repeats=(1,))


def test_with_a_cache_examples_are_read_once(
    folder: Path, tiny_processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, kept = (
        PreparedImages(
            DataConfig(folders=(str(folder),) * 2, cache=cache), "train", tiny_processor, schema=SCHEMAS["nlvr2"]
        )
        for cache in (False, True)
    )
    numbers = [3, plain.num_examples - 1, 0, 3]
    expected = plain.examples(numbers)
    assert kept.examples(numbers[:1]) == expected[:1]
    for each in kept.sets:
        monkeypatch.setattr(each, "examples", None)
        monkeypatch.setattr(each, "scan", None)
    assert kept.examples(numbers) == expected
