"""Rows of GLUE as batches: one text or two, classes or numbers."""

from pathlib import Path

import pytest
import torch

import originals
from bridgetower.data.glue_texts import GlueTexts
from bridgetower.data.sampling import BatchKey
from bridgetower.processor import Processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return originals.write_glue(tmp_path_factory.mktemp("glue"))


def test_single_texts_and_classes(folder: Path, tiny_processor: Processor) -> None:
    texts = GlueTexts(folder, "sst-2", "train", tiny_processor)
    batch = texts[BatchKey((1, 0), 5)]
    expected = tiny_processor.texts(
        ["that loves its characters", "hide new secretions from the parental units"], truncate=True
    )
    assert torch.equal(batch.input_ids, expected.input_ids)
    assert batch.labels.tolist() == [1, 0]
    assert texts.labels().tolist() == [0, 1] * 4
    assert (batch.ids, batch.seed) == (("1", "0"), 5)


def test_pairs_and_numbers(folder: Path, tiny_processor: Processor) -> None:
    texts = GlueTexts(folder, "sts-b", "train", tiny_processor)
    batch = texts[BatchKey((2, 1), 5)]
    ids = tiny_processor.pair_ids([("A man spreads cheese.", "He sleeps."), ("A man plays a flute.", "A man plays.")])
    assert torch.equal(batch.input_ids, tiny_processor.pad(ids).input_ids)
    assert batch.labels.tolist() == pytest.approx([0.0, 3.8])


def test_several_splits_and_no_labels(folder: Path, tiny_processor: Processor) -> None:
    assert len(GlueTexts(folder, "mnli", ("train", "validation-mismatched"), tiny_processor)) == 18
    texts = GlueTexts(folder, "mnli", "test", tiny_processor)
    assert texts[BatchKey((0, 1), 0)].labels is None
    with pytest.raises(ValueError, match=r"test_matched\.tsv has no labels; choose a split that has"):
        texts.labels()
    assert list(texts.digests()) == [str(folder / "MNLI" / "test_matched.tsv")]
