"""Statements about one picture or two as batches."""

from pathlib import Path
from typing import Any

import pytest
import torch

import asked
from bridgetower.data.batch import Nlvr2Batch, SnliVeBatch
from bridgetower.data.config import DataConfig
from bridgetower.data.pictures import Pictures
from bridgetower.data.sampling import BatchKey
from bridgetower.data.schema import SCHEMAS
from bridgetower.data.statements import Statements
from bridgetower.model.config import FIXED_LABELS
from bridgetower.processor import Processor


@pytest.fixture
def load(tmp_path: Path, tiny_processor: Processor) -> Any:
    def make(kind: str, split: str = "train", *, labelled: bool = False, **config: Any) -> Statements:
        folder = tmp_path / kind
        if not folder.exists():
            asked.write_set(folder, kind)
        pictures = Pictures(DataConfig(folders=(str(folder),), **config), split, tiny_processor, schema=SCHEMAS[kind])
        return Statements(pictures, labelled=labelled)

    return make


def test_classes_are_in_the_order_of_the_heads() -> None:
    assert {kind: schema.labels for kind, schema in SCHEMAS.items() if schema.labels} == {
        "snli-ve": FIXED_LABELS["snli_ve"],
        "nlvr2": FIXED_LABELS["nlvr2"],
    }


def test_one_picture(load: Any, tiny_processor: Processor) -> None:
    statements = load("snli-ve", labelled=True)
    batch = statements[BatchKey((2, 0), 1)]
    assert isinstance(batch, SnliVeBatch)
    assert batch.ids == ("1.jpg#1r", "0.jpg#0r")
    assert torch.equal(batch.pixel_values, tiny_processor.images([asked.png("green"), asked.png("red")]))
    assert torch.equal(batch.input_ids, tiny_processor.texts(["it is red", "it is red"]).input_ids)
    assert batch.labels.tolist() == [1, 2]  # neutral, entailment
    assert statements.labels()[[2, 0]].tolist() == [1, 2]


def test_two_pictures(load: Any, tiny_processor: Processor) -> None:
    statements = load("nlvr2", labelled=True)
    batch = statements[BatchKey((1, 0), 1)]
    assert isinstance(batch, Nlvr2Batch)
    assert batch.ids == ("train-0-1-0", "train-0-0-0")
    first, second = (
        tiny_processor.images([asked.png(name) for name in names]) for names in (("green", "red"), ("red", "orange"))
    )
    assert torch.equal(batch.pixel_values, first)
    assert torch.equal(batch.pixel_values_2, second)
    assert batch.labels.tolist() == [0, 1]


@pytest.mark.parametrize("kind", ["snli-ve", "nlvr2"])
def test_without_labels(load: Any, kind: str) -> None:
    assert load(kind, "test")[BatchKey((0, 1), 0)].labels is None
    with pytest.raises(ValueError, match=r"of split test has the label ''; expected one of .*choose a split that has"):
        load(kind, "test", labelled=True)


def test_batch_is_a_function_of_its_key(load: Any) -> None:
    statements = load("nlvr2", random_crop=0.5, flip=True, rand_augment="colour", rand_magnitude=7)
    key = BatchKey((3, 0), 17)
    first, _ = statements[key], torch.manual_seed(99)
    again, other = statements[key], statements[BatchKey((3, 0), 18)]
    assert torch.equal(first.pixel_values_2, again.pixel_values_2)
    assert not torch.equal(first.pixel_values_2, other.pixel_values_2)
