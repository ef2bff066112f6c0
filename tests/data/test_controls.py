"""Examples with pictures that are not theirs."""

from pathlib import Path

import pytest
import torch

import asked
from bridgetower.data.config import DataConfig
from bridgetower.data.controls import WithOtherPictures
from bridgetower.data.pictures import Pictures
from bridgetower.data.sampling import BatchKey
from bridgetower.data.schema import SCHEMAS
from bridgetower.data.statements import Statements


@pytest.mark.parametrize("kind", ["snli-ve", "nlvr2"])
def test_texts_stay_and_pictures_are_those_of_the_other_half(tmp_path: Path, tiny_processor, kind):
    asked.write_set(tmp_path, kind)
    data = DataConfig(folders=(str(tmp_path),))
    statements = Statements(Pictures(data, "train", tiny_processor, schema=SCHEMAS[kind]))
    others = WithOtherPictures(statements)
    everything = tuple(range(len(statements)))
    own, other = statements[BatchKey(everything, 3)], others[BatchKey(everything, 3)]
    assert len(others) == len(statements) >= 2
    assert other.ids == own.ids
    assert torch.equal(other.input_ids, own.input_ids)
    assert torch.equal(other.labels, own.labels)
    shift = len(statements) // 2
    for name in ("pixel_values", "pixel_values_2") if kind == "nlvr2" else ("pixel_values",):
        expected = getattr(own, name).roll(-shift, dims=0)
        assert torch.equal(getattr(other, name), expected)
        assert not torch.equal(expected, getattr(own, name))


def test_a_single_example_has_no_other_picture():
    with pytest.raises(ValueError, match="1 example has no other picture"):
        WithOtherPictures([None])
