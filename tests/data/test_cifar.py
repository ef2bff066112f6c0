"""CIFAR's binary files: pictures, classes, splits, and damaged files."""

from pathlib import Path

import numpy as np
import pytest
import torch

import originals
from bridgetower.data.batch import BatchKey
from bridgetower.data.single_tower import CifarImages, cifar_names
from bridgetower.processor import Processor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    originals.write_cifar10(tmp_path)
    return tmp_path


def test_pictures_and_classes(folder: Path, tiny_processor: Processor) -> None:
    images = CifarImages(folder, "train", tiny_processor, 10)
    batch = images[BatchKey((9, 0), 3)]
    pictures = [np.ascontiguousarray(originals.cifar_picture(number).transpose(1, 2, 0)) for number in (9, 0)]
    assert torch.equal(batch.pixel_values, tiny_processor.images(pictures))
    assert batch.labels.tolist() == [2, 0]  # row 1 of file 1, row 0 of file 0
    assert batch.ids == ("data_batch_2-1", "data_batch_1-0")
    assert images.labels()[[9, 0]].tolist() == [2, 0]
    assert images.ids()[9] == "data_batch_2-1"
    assert cifar_names(folder, 10) == originals.CIFAR10


def test_splits(folder: Path, tiny_processor: Processor) -> None:
    splits = {name: CifarImages(folder, name, tiny_processor, 10) for name in ("train", "validation", "test")}
    assert {name: len(images) for name, images in splits.items()} == {"train": 36, "validation": 4, "test": 8}
    assert splits["validation"].ids() == [f"data_batch_5-{row}" for row in range(4, 8)]
    assert splits["test"].ids()[0] == "test_batch-0"
    whole = CifarImages(folder, ("train", "validation"), tiny_processor, 10)
    assert whole.ids() == [*splits["train"].ids(), *splits["validation"].ids()]
    assert len(whole.digests()) == 6
    with pytest.raises(ValueError, match="CIFAR has no split 'dev'; expected one of train, validation, test"):
        CifarImages(folder, "dev", tiny_processor, 10)


def test_fine_classes(tmp_path: Path, tiny_processor: Processor) -> None:
    home = originals.write_cifar100(tmp_path)
    for folder in (tmp_path, home):
        images = CifarImages(folder, "train", tiny_processor, 100)
        assert images.labels().tolist() == [(7 * row) % 100 for row in range(18)]
        assert cifar_names(folder, 100)[7] == "class_7"


def test_damaged_and_missing_files(folder: Path, tiny_processor: Processor) -> None:
    home = folder / "cifar-10-batches-bin"
    path = home / "data_batch_3.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"data_batch_3\.bin has 24583 bytes, which are no images of 3073"):
        CifarImages(folder, "train", tiny_processor, 10)
    path.write_bytes(b"\x0b" + whole[1:])
    with pytest.raises(ValueError, match="an image of class 11"):
        CifarImages(folder, "train", tiny_processor, 10)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no data_batch_3\.bin in .*; give the folder of the binary version"):
        CifarImages(folder, "train", tiny_processor, 10)
