"""The cache of features of frozen towers, and the examples that are made of it."""

import logging
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bridgetower.data.batches import frozen as frozen_module
from bridgetower.data.batches.batch import BatchKey
from bridgetower.data.batches.captions import CaptionPairs
from bridgetower.data.batches.frozen import FrozenDataset, cached_features, key_ids, text_keys
from bridgetower.data.config import MaskingConfig
from bridgetower.data.sets.store import Table
from bridgetower.files import locked
from helpers.sets import caption_images

LAYERS = 2
WIDTH = 3
SHAPE = {"num_layers": LAYERS, "width": WIDTH, "dtype": torch.float32}


def row_of(number, length):
    """A row whose values tell its number, and the place of each token, and its layer."""
    tokens = 100.0 * number + 10 * torch.arange(length)[:, None]
    return (tokens + torch.arange(LAYERS)[:, None, None]).expand(LAYERS, length, WIDTH)


def filled(folder, lengths, **options):
    def compute(numbers):
        yield from (row_of(number, lengths[number]) for number in numbers)

    return cached_features(folder, {}, len(lengths), 3, compute, **SHAPE | options)


@pytest.mark.parametrize("commit_bytes", [1, 150, 2**26])
def test_rows_come_back_in_any_order_and_are_filled_up(commit_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_module, "_COMMIT_BYTES", commit_bytes)
    features = pickle.loads(pickle.dumps(filled(tmp_path, [3, 1, 2, 4])))
    states = features.read([2, 0, 2])
    assert states.shape == (3, LAYERS, 3, WIDTH)
    assert states[:, 0, :, 0].tolist() == [[200, 210, 0], [0, 10, 20], [200, 210, 0]]
    assert states[:, 1, :, 2].tolist() == [[201, 211, 0], [1, 11, 21], [201, 211, 0]]
    assert features.read([1], 5).shape == (1, LAYERS, 5, WIDTH)
    halves = [row_of(number, 2).bfloat16() for number in range(2)]
    features = cached_features(
        tmp_path / "halves",
        {},
        2,
        2,
        lambda numbers: (halves[n] for n in numbers),
        **SHAPE | {"dtype": torch.bfloat16},
    )
    assert torch.equal(features.read([1, 0]), torch.stack(halves[::-1]))


def test_a_damaged_row_is_named(tmp_path):
    features = filled(tmp_path, [2, 2])
    (file,) = (Path(features.table.uri) / "data").glob("*.lance")
    content = file.read_bytes()
    value = row_of(1, 2)[1, 1, 1].numpy().tobytes()
    assert content.count(value) == WIDTH
    file.write_bytes(content.replace(value, bytes(4)))
    with pytest.raises(OSError, match=r"row 1 of .*states\.lance is damaged"):
        replace(features, table=Table(features.table.uri)).read([0, 1])


def test_a_row_that_is_there_is_not_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_module, "_COMMIT_BYTES", 1)
    computed = []

    def compute(numbers):
        for number in numbers:
            if len(computed) == 3:
                raise KeyboardInterrupt
            yield row_of(number, 2)
            computed.append(number)

    with pytest.raises(KeyboardInterrupt):
        cached_features(tmp_path, {}, 5, 2, compute, **SHAPE)
    first = computed
    computed = []
    features = cached_features(tmp_path, {}, 5, 2, compute, **SHAPE)
    assert first + computed == [0, 1, 2, 3, 4]
    assert features.read(range(5))[:, 0, 0, 0].tolist() == [0, 100, 200, 300, 400]


def put_vector(cache, name, size=4000):
    """Puts a row of so many bytes into the cache."""

    def compute(numbers):
        yield from (torch.rand(1, 1, size // 4) for _ in numbers)

    shape = {"num_layers": 1, "width": size // 4, "dtype": torch.float32}
    features = cached_features(cache, {"name": name}, 1, 1, compute, **shape)
    return Path(features.table.uri).parent


def test_a_small_disk_is_noticed_before_anything_is_computed(small_disk):
    disk = small_disk(256)
    folder = put_vector(disk, "a", 100_000)
    with pytest.raises(
        OSError, match=r"features of frozen towers take .* GiB, but the disk of .* has"
    ):
        put_vector(disk, "large", 4_000_000)
    assert folder.exists()


def test_one_that_was_removed_while_another_waited_is_made_again(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = put_vector(tmp_path, "a")
    with ThreadPoolExecutor(1) as pool:
        with locked(folder):
            result = pool.submit(put_vector, tmp_path, "a")
            while "waiting for it" not in caplog.text:
                time.sleep(0.01)
            shutil.rmtree(folder)
        assert result.result() == folder
    assert len(Table(folder / "states.lance")) == 1


@pytest.fixture(scope="module")
def frozen_set(tiny_dataset, tiny_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    images = caption_images(tiny_dataset, "train", tiny_processor)
    features = filled(folder / "images", [1] * 2 * len(images), num_views=2)
    pairs = CaptionPairs(images, MaskingConfig(probability=0.5))
    frozen_set = FrozenDataset(pairs, images, features, 0)
    keys = frozen_set.needed_texts()
    lengths = [len(key_ids(key)) for key in keys]
    frozen_set.use_text_features(keys, filled(folder / "texts", lengths))
    return frozen_set


class TestExamples:
    """Images in two views, whose states tell the row."""

    def test_every_text_is_needed_once_and_short_ones_come_first(self, frozen_set):
        keys = frozen_set.needed_texts()
        lengths = [len(key_ids(key)) for key in keys]
        assert lengths == sorted(lengths)
        assert len(set(keys)) == len(keys)
        captions = len(
            {
                caption
                for image_captions in frozen_set.examples.images.all_captions()
                for caption in image_captions
            }
        )
        assert captions < len(keys) <= captions + 2 * len(frozen_set)
        padded = text_keys(
            torch.tensor([[5, 6, 1], [5, 6, 7]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
        )
        assert [key_ids(key).tolist() for key in padded] == [[5, 6], [5, 6, 7]]

    def test_states_are_those_of_the_images_and_texts(self, frozen_set):
        key = BatchKey((3, 0, 3), 5)
        batch = frozen_set[key]
        batches = [batch, *(frozen_set[replace(key, seed=seed)] for seed in range(60))]
        views = [(batch_of_seed.image_states[:, 0, 0, 0] / 100).long() for batch_of_seed in batches]
        owners = frozen_set.examples.pairs[[3, 0, 3], 0]
        assert all(torch.equal(rows // 2, owners) for rows in views)
        assert len({tuple((rows % 2).tolist()) for rows in views}) == 8  # any view of each
        for ids, states in (
            (batch.input_ids, batch.text_states),
            (batch.masked_input_ids, batch.masked_states),
        ):
            rows = [frozen_set.row_of_text[key] for key in text_keys(ids, batch.attention_mask)]
            assert torch.equal(states, frozen_set.text_features.read(rows, ids.shape[1]))
        hidden = batch.mlm_labels >= 0
        assert torch.equal(batch.input_ids[hidden], batch.mlm_labels[hidden])
        assert torch.equal(batch.input_ids[~hidden], batch.masked_input_ids[~hidden])

    def test_a_batch_depends_on_its_key_only_also_in_another_process(self, frozen_set):
        key = BatchKey((3, 0, 3), 5)
        expected = vars(frozen_set[key])
        for batch in (frozen_set[key], pickle.loads(pickle.dumps(frozen_set))[key]):
            for name, value in vars(batch).items():
                assert (
                    torch.equal(value, expected[name])
                    if isinstance(value, Tensor)
                    else value == expected[name]
                )

    def test_labels_of_a_step_are_those_of_its_batches(self, frozen_set):
        step = tuple(BatchKey((number, number + 1), number) for number in range(3))
        batch = frozen_set[replace(step[0], step=step)]
        alone = frozen_set[step[0]]
        assert int(batch.step_labels) == sum(int(frozen_set[key].num_labels) for key in step)
        assert alone.step_labels is None
        assert torch.equal(batch.image_states, alone.image_states)
        assert torch.equal(batch.masked_states, alone.masked_states)
