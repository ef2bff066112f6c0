"""Questions and statements as examples: which ones there are, and in which order."""

from pathlib import Path

import pytest

import asked
from bridgetower.data.config import DataConfig
from bridgetower.data.entries import Entries
from bridgetower.data.pictures import Pictures
from bridgetower.data.schema import SCHEMAS
from bridgetower.processor import Processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return asked.write_set(tmp_path_factory.mktemp("snli"), "snli-ve")


def pictures(
    processor: Processor, *folders: Path, splits: str | tuple[str, ...] = "train", **config: object
) -> Pictures:
    data = DataConfig(folders=tuple(map(str, folders)), **config)
    return Pictures(data, splits, processor, schema=SCHEMAS["snli-ve"])


def test_one_example_per_statement_in_order(folder: Path, tiny_processor: Processor) -> None:
    entries = Entries(pictures(tiny_processor, folder))
    expected = [(number, place) for number in range(8) for place in range(1 + number % 2)]
    assert len(entries) == len(expected)
    names = [f"{number}.jpg#{place}r" for number, place in expected]
    assert [entry["statement_id"] for entry in entries] == names
    images, chosen = entries.chosen((5, 0))
    assert images == [expected[5][0], 0]
    assert [entry["statement_id"] for entry in chosen] == [names[5], names[0]]


def test_what_is_not_kept_is_no_example(folder: Path, tiny_processor: Processor) -> None:
    entries = Entries(pictures(tiny_processor, folder), lambda entry: entry["label"] == "neutral")
    assert {entry["label"] for entry in entries} == {"neutral"}
    assert len(entries) == len(list(entries)) < 12
    _, chosen = entries.chosen(range(len(entries)))
    assert chosen == list(entries)


def test_repeats_and_several_splits(folder: Path, tiny_processor: Processor) -> None:
    once = len(Entries(pictures(tiny_processor, folder)))
    assert len(Entries(pictures(tiny_processor, folder, folder, repeats=(1, 3)))) == 4 * once
    both = Entries(pictures(tiny_processor, folder, splits=("train", "validation")))
    validation = Entries(pictures(tiny_processor, folder, splits="validation"))
    assert list(both)[once:] == list(validation)


def test_nothing_left(folder: Path, tiny_processor: Processor) -> None:
    with pytest.raises(ValueError, match=rf"no example in split train of {folder} is fit for this; choose another"):
        Entries(pictures(tiny_processor, folder), lambda entry: False)
