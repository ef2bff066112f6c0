"""Stored outputs in the place of pixels and ids; how texts are found, and which views are drawn."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bridgetower.data import batch as batch_module
from bridgetower.data.batch import TOKENS, BatchKey, CachedFeatures
from bridgetower.data.captions import CaptionImages, CaptionPairs
from bridgetower.data.config import DataConfig, MaskingConfig
from bridgetower.data.frozen import (
    FrozenDataset,
    FrozenImages,
    FrozenTexts,
    key_ids,
    needed_texts,
    text_keys,
)
from bridgetower.processor import Processor
from bridgetower.rows import RowFiles

LAYERS, WIDTH = 2, 3


@pytest.fixture
def store(tmp_path: Path) -> Callable[[str, list[int]], RowFiles]:
    """Writes rows of some lengths; each token holds its row, its place, its layer."""

    def write(name: str, lengths: list[int]) -> RowFiles:
        files = RowFiles(tmp_path, name, num_rows=len(lengths), rows_per_part=5)
        for number in files.missing():
            rows = [torch.zeros(lengths[row], LAYERS, WIDTH) for row in files.rows_of(number)]
            for row, values in zip(files.rows_of(number), rows, strict=True):
                values += 100 * row + 10 * torch.arange(len(values))[:, None, None] + torch.arange(LAYERS)[:, None]
            files.write(number, {TOKENS: rows})
        return files

    return write


class TestOutputs:
    def test_layers(self, store: Callable[[str, list[int]], RowFiles]) -> None:
        outputs = CachedFeatures(store("texts", [3, 1, 2]), [2, 0, 2])
        first, second = outputs.layers()
        assert len(outputs) == 3
        assert first[:, :, 0].tolist() == [[200, 210, 0], [0, 10, 20], [200, 210, 0]]
        assert second[:, :, 0].tolist() == [[201, 211, 0], [1, 11, 21], [201, 211, 0]]
        assert torch.equal(outputs.layers(1)[0], second)

    def test_are_put_together(self, store: Callable[[str, list[int]], RowFiles]) -> None:
        files = store("texts", [3, 1, 2])
        whole = CachedFeatures.cat([CachedFeatures(files, [1]), CachedFeatures(files, [0, 2])])
        assert whole.rows == (1, 0, 2)

    def test_vectors_are_kept_up_to_a_number_of_bytes(
        self, store: Callable[[str, list[int]], RowFiles], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files, computed = store("texts", [1] * 5), list[int]()

        def compute(row: CachedFeatures) -> torch.Tensor:
            computed.extend(row.rows)
            return torch.full((1, 6), float(row.rows[0]))

        monkeypatch.setattr(batch_module, "_MOST_VECTORS", 3 * 6 * 4)
        for _ in range(2):
            assert CachedFeatures(files, range(5)).vectors(compute)[:, 0].tolist() == [0, 1, 2, 3, 4]
        assert computed == [0, 1, 2, 3, 4, 3, 4]


class TestPictures:
    def test_rows_and_places_belong_together(self, store: Callable[[str, list[int]], RowFiles]) -> None:
        frozen = FrozenImages(files=store("p", [1] * 18), num_views=3, seed=4)
        places = [frozen.place(row) for row in range(18)]
        assert [image for image, _ in places] == [image for image in range(6) for _ in range(3)]
        assert len({int(draws.initial_seed()) for _, draws in places}) == 18
        assert frozen.first_views([2, 0]).rows == (6, 0)
        drawn = frozen.views([2] * 50 + [0], torch.Generator().manual_seed(0))
        assert set(drawn.rows[:-1]) == {6, 7, 8}
        assert drawn.rows[-1] in {0, 1, 2}
        again = drawn.drawn(torch.Generator().manual_seed(1))
        assert again.rows != drawn.rows
        assert again.firsts == drawn.firsts
        joined = type(drawn).cat([drawn, again])
        assert joined.rows == drawn.rows + again.rows
        assert set(joined.drawn(torch.Generator().manual_seed(2)).rows) <= {0, 1, 2, 6, 7, 8}


class TestTexts:
    def test_padding_does_not_count(self) -> None:
        ids, mask = torch.tensor([[5, 6, 1], [5, 6, 7]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
        keys = text_keys(ids, mask)
        assert keys[0] == text_keys(ids[:1, :2], mask[:1, :2])[0]
        assert [key_ids(key).tolist() for key in keys] == [[5, 6], [5, 6, 7]]

    def test_one_that_was_not_computed(self, store: Callable[[str, list[int]], RowFiles]) -> None:
        ids = torch.tensor([[5, 6]])
        texts = FrozenTexts(store("texts", [2]), text_keys(ids, torch.ones_like(ids)))
        assert texts.features(ids, torch.ones_like(ids)).rows == (0,)
        with pytest.raises(KeyError):
            texts.features(ids + 1, torch.ones_like(ids))


class TestExamples:
    @pytest.fixture
    def examples(
        self, store: Callable[[str, list[int]], RowFiles], tiny_dataset: Path, tiny_processor: Processor
    ) -> FrozenDataset:
        images = CaptionImages(DataConfig(folders=(str(tiny_dataset),)), "train", tiny_processor)
        pairs = CaptionPairs(images, MaskingConfig(probability=0.5))
        images.frozen = FrozenImages(files=store("p", [1] * 2 * len(images)), num_views=2, seed=0)
        keys = needed_texts(FrozenDataset(pairs, 2, 0))
        return FrozenDataset(pairs, 2, 0, FrozenTexts(store("t", [len(key_ids(key)) for key in keys]), keys))

    def test_every_text_is_needed_once_and_short_ones_come_first(self, examples: FrozenDataset) -> None:
        keys = needed_texts(FrozenDataset(examples.examples, 2, 0))
        lengths = [len(key_ids(key)) for key in keys]
        assert lengths == sorted(lengths)
        assert len(set(keys)) == len(keys)
        captions = len({caption for said in examples.examples.images.all_captions() for caption in said})
        assert captions < len(keys) <= captions + 2 * len(examples)

    def test_a_batch_depends_on_its_key_only_also_in_another_process(self, examples: FrozenDataset) -> None:
        key = BatchKey((3, 0, 3), 5)
        batches = [examples[key], examples[key], pickle.loads(pickle.dumps(examples))[key]]
        for batch in batches:
            assert batch.input_ids.rows == batches[0].input_ids.rows
            assert batch.masked_input_ids.rows == batches[0].masked_input_ids.rows
            assert batch.pixel_values.rows == batches[0].pixel_values.rows
            assert torch.equal(batch.mlm_labels, batches[0].mlm_labels)
            assert len(batch) == 3

    def test_labels_of_a_step_are_those_of_its_batches(self, examples: FrozenDataset) -> None:
        step = tuple(BatchKey((number, number + 1), number) for number in range(3))
        batch = examples[replace(step[0], step=step)]
        assert int(batch.step_labels) == sum(int(examples[key].num_labels) for key in step)
        assert batch.input_ids.rows == examples[step[0]].input_ids.rows
        assert batch.pixel_values.rows == examples[step[0]].pixel_values.rows
        assert examples[step[0]].step_labels is None

    def test_labels_belong_to_the_masked_texts(self, examples: FrozenDataset) -> None:
        batch = examples[BatchKey((1,), 0)]
        keys = {row: key for key, row in examples.texts._row_of.items()}
        plain, masked = (key_ids(keys[field.rows[0]]) for field in (batch.input_ids, batch.masked_input_ids))
        hidden = batch.mlm_labels[0] >= 0
        assert torch.equal(plain[hidden], batch.mlm_labels[0][hidden])
        assert torch.equal(plain[~hidden], masked[~hidden])
