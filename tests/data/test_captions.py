"""Batches as pure functions of their key, and the order in which keys come."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from bridgetower.data.batch import CaptionBatch
from bridgetower.data.captions import BatchKey, CaptionImages, CaptionPairs, StepSampler, derive_seed
from bridgetower.data.config import DataConfig, MaskingConfig
from bridgetower.data.prepare import prepare_pairs
from bridgetower.data.records import Record, write_split
from bridgetower.processor import Processor


@pytest.fixture
def load(tiny_dataset: Path, tiny_processor: Processor) -> Any:
    """Makes the pairs of the set, or of other folders, under a data config."""

    def make(*folders: Path, split: str = "train", masking: float = 0.3, **config: Any) -> CaptionPairs:
        data = DataConfig(folders=tuple(map(str, folders or (tiny_dataset,))), **config)
        return CaptionPairs(CaptionImages(data, split, tiny_processor), MaskingConfig(probability=masking))

    return make


def equal(first: CaptionBatch, second: CaptionBatch) -> bool:
    pairs = [(getattr(first, item.name), getattr(second, item.name)) for item in fields(CaptionBatch)]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def keys(num_pairs: int, steps: Iterable[int] = range(4), **values: Any) -> list[BatchKey]:
    options = {"batch_size": 4, "micro_batches": 1, "seed": 0} | values
    return list(StepSampler(num_pairs, steps=steps, **options))  # type: ignore[arg-type]


class TestImages:
    def test_split_in_order(self, load: Any, tiny_dataset: Path) -> None:
        images = load(split="test").images
        assert len(images) == 9
        texts, index = images.texts()
        assert texts == [caption for captions in images.captions for caption in captions]
        assert index.tolist() == [row for row, captions in enumerate(images.captions) for _ in captions]
        first, first_index = images.texts(1)
        assert first == [captions[0] for captions in images.captions]
        assert first_index.tolist() == list(range(9))

    def test_several_folders(self, load: Any, tiny_dataset: Path) -> None:
        images = load(tiny_dataset, tiny_dataset).images
        assert len(images) == 54
        assert torch.equal(images.pixels(30), images.pixels(3))
        assert images.image_bytes(30) == images.image_bytes(3)

    def test_cache_keeps_what_was_decoded(self, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        for cache, decoded in ((True, 1), (False, 2)):
            images, calls = load(cache=cache).images, []
            resize = images.processor.resize
            monkeypatch.setattr(images.processor, "resize", lambda image: calls.append(1) or resize(image))  # noqa: B023
            assert torch.equal(images.pixels(2), images.pixels(2))
            assert len(calls) == decoded
            monkeypatch.undo()

    def test_missing_folders(self, load: Any, tmp_path: Path, tiny_processor: Processor) -> None:
        with pytest.raises(ValueError, match=r"no data folder given; pass --data\.folders"):
            CaptionImages(DataConfig(), "train", tiny_processor)
        with pytest.raises(FileNotFoundError, match="nowhere"):
            load(tmp_path / "nowhere")

    def test_a_broken_picture_is_named(self, load: Any, tmp_path: Path) -> None:
        record = Record(image=b"not a picture", file_name="x.png", image_id="the-broken-one", captions=("a bar",))
        write_split(tmp_path / "train.parquet", [record])
        with pytest.raises(ValueError, match=rf"picture the-broken-one of {tmp_path}: .*13 image bytes"):
            load(tmp_path)[BatchKey((0,), 0)]


class TestConfig:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"folders": ("a", "b"), "repeats": (1,)}, "expected one positive number each"),
            ({"folders": ("a",), "repeats": (0,)}, "expected one positive number each"),
            ({"captions": "two"}, "captions 'two' and augmentation 'none'; expected one of all, one"),
            ({"augmentation": "flip"}, "augmentation 'flip'; expected one of all, one and one of none, affine"),
            ({"word_dropout": 1.0}, "word_dropout is 1.0; expected a share"),
            ({"max_length": 2}, "max_length 2"),
            ({"num_workers": -1}, "num_workers -1"),
        ],
    )
    def test_errors(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            DataConfig(**values)


class TestPairs:
    def test_all_captions_or_one_drawn(self, load: Any) -> None:
        everything, one = load(), load(captions="one")
        assert len(everything) == sum(map(len, everything.images.captions))
        assert len(one) == len(everything.images)
        image = next(row for row, captions in enumerate(one.images.captions) if len(captions) == 2)
        drawn = {tuple(one[BatchKey((image,), seed)].input_ids[0].tolist()) for seed in range(20)}
        assert len(drawn) == 2

    def test_repeats(self, load: Any, tiny_dataset: Path) -> None:
        once = load()
        pairs = load(tiny_dataset, tiny_dataset, repeats=(1, 3))
        assert len(pairs) == 4 * len(once)
        counts = Counter(pairs.pairs)
        assert {counts[image, number] for image, number in pairs.pairs if image < 27} == {1}
        assert {counts[image, number] for image, number in pairs.pairs if image >= 27} == {3}

    def test_batch_is_a_function_of_its_key(self, load: Any) -> None:
        options = {"captions": "one", "augmentation": "affine", "word_dropout": 0.3}
        pairs, key = load(**options), BatchKey((3, 0, 11, 3), 17)
        first = pairs[key]
        _ = pairs[BatchKey((1, 2), 3)], torch.randn(5)
        torch.manual_seed(99)
        assert equal(pairs[key], first)
        assert equal(load(**options)[key], first)
        assert not equal(pairs[BatchKey(key.pairs, 18)], first)
        assert not equal(pairs[BatchKey((3, 0, 11, 4), 17)], first)

    def test_content(self, load: Any) -> None:
        pairs = load(masking=0.5)
        chosen = (5, 0, 9)
        batch, images = pairs[BatchKey(chosen, 1)], pairs.images
        numbers = [pairs.pairs[pair] for pair in chosen]
        assert batch.image_index.tolist() == [image for image, _ in numbers]
        assert batch.ids == tuple(images.image_ids[image] for image, _ in numbers)
        assert torch.equal(batch.pixel_values, images.pixel_values([image for image, _ in numbers]))
        texts = images.processor.texts([images.captions[image][number] for image, number in numbers])
        assert torch.equal(batch.input_ids, texts.input_ids)
        assert batch.attention_mask is not None
        assert torch.equal(batch.attention_mask, texts.attention_mask)
        hidden = batch.mlm_labels >= 0
        assert torch.equal(batch.mlm_labels[hidden], batch.input_ids[hidden])
        assert torch.equal(batch.masked_input_ids[~hidden], batch.input_ids[~hidden])
        assert 0 < int(hidden.sum()) < hidden.numel()
        special = torch.isin(batch.input_ids, torch.tensor(sorted(images.processor.special_ids)))
        assert not (hidden & special).any()
        assert len(batch) == 3
        assert batch.seed == 1

    def test_augmentation_changes_pictures_only(self, load: Any) -> None:
        key = BatchKey((0, 1, 2), 5)
        plain, turned = load()[key], load(augmentation="affine")[key]
        assert not torch.equal(plain.pixel_values, turned.pixel_values)
        assert torch.equal(plain.masked_input_ids, turned.masked_input_ids)

    def test_words_are_dropped(self, load: Any) -> None:
        key = BatchKey((0, 1, 2), 5)
        plain, fewer = load()[key], load(word_dropout=0.5)[key]
        assert torch.equal(plain.pixel_values, fewer.pixel_values)
        assert fewer.input_ids.shape[1] < plain.input_ids.shape[1]

    def test_whole_words_are_hidden(self, load: Any) -> None:
        def torn(whole_word: bool) -> int:
            """Counts tokens that carry on a word and are treated otherwise than the token before them."""
            pairs = load()
            pairs.masking = MaskingConfig(probability=0.4, whole_word=whole_word)
            table, special, count = pairs.images.processor.continues_word, pairs.images.processor.special_ids, 0
            for key in keys(len(pairs), range(3)):
                batch = pairs[key]
                hidden = batch.mlm_labels >= 0
                after_special = torch.isin(batch.input_ids[:, :-1], torch.tensor(list(special)))
                carries_on = table[batch.input_ids[:, 1:]] & ~after_special
                count += int((carries_on & (hidden[:, 1:] != hidden[:, :-1])).sum())
            return count

        assert torn(whole_word=True) == 0
        assert torn(whole_word=False) > 0

    def test_moving_keeps_everything(self, load: Any) -> None:
        batch = load()[BatchKey((0, 1), 2)]
        moved = batch.to(torch.device("cpu"))
        assert equal(moved, batch)
        assert moved is not batch


class TestSampler:
    @given(
        num_pairs=st.integers(4, 60), parts=st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]), seed=st.integers(0, 99)
    )
    def test_an_epoch_covers_each_pair_once(self, num_pairs: int, parts: tuple[int, int], seed: int) -> None:
        world_size, micro_batches = parts
        options = {"micro_batches": micro_batches, "world_size": world_size, "seed": seed}
        epoch = num_pairs // 4
        for steps in (range(epoch), range(epoch, 2 * epoch)):
            seen = [
                pair
                for rank in range(world_size)
                for key in keys(num_pairs, steps, rank=rank, **options)
                for pair in key.pairs
            ]
            assert len(seen) == len(set(seen)) == 4 * epoch
            assert set(seen) <= set(range(num_pairs))

    def test_epochs_and_seeds_differ(self) -> None:
        first, second, other = keys(16), keys(16, range(4, 8)), keys(16, seed=1)
        assert len({tuple(key.pairs for key in part) for part in (first, second, other)}) == 3
        assert len({key.seed for part in (first, second, other) for key in part}) == 12

    def test_ranks_and_micro_batches_share_out_the_batch_of_one_process(self) -> None:
        whole = keys(30, range(15), batch_size=8)
        shared = [keys(30, range(15), batch_size=8, micro_batches=2, rank=rank, world_size=2) for rank in range(2)]
        for step, key in enumerate(whole):
            parts = [shared[rank][2 * step + micro].pairs for rank in range(2) for micro in range(2)]
            assert key.pairs == tuple(pair for part in parts for pair in part)
        assert len({key.seed for part in shared for key in part}) == 60

    def test_continues_in_the_middle_of_an_epoch(self) -> None:
        assert keys(14, range(5, 9)) == keys(14, range(9))[5:]

    def test_length(self) -> None:
        sampler = StepSampler(30, batch_size=8, micro_batches=2, steps=range(3, 10), seed=0)
        assert len(sampler) == len(list(sampler)) == 14
        assert sampler.steps_per_epoch == 3

    def test_some_steps_come_twice_as_a_whole(self) -> None:
        once = keys(30, range(3), batch_size=8, micro_batches=2)
        options = {"batch_size": 8, "micro_batches": 2, "passes": lambda step: 2 if step == 1 else 1}
        assert keys(30, range(3), **options) == [*once[:2], *once[2:4], *once[2:4], *once[4:]]
        assert len(StepSampler(30, steps=range(3), seed=0, **options)) == 8

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"batch_size": 15}, "14 pairs are fewer than one batch of 15; lower batch_size"),
            (
                {"micro_batches": 3},
                "batch_size 4 does not split into 1 processes x 3 micro-batches; use a multiple of 3",
            ),
            ({"world_size": 8}, "does not split into 8 processes x 1 micro-batches"),
        ],
    )
    def test_errors(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            keys(14, **values)


class TestWorkers:
    def test_equal_batches_with_any_number_of_workers(self, load: Any) -> None:
        pairs = load(captions="one", augmentation="affine", cache=True)
        batches = []
        for workers in (0, 2):
            sampler = StepSampler(len(pairs), batch_size=8, micro_batches=2, steps=range(2, 6), seed=4)
            torch.manual_seed(workers)
            batches.append(list(DataLoader(pairs, sampler=sampler, batch_size=None, num_workers=workers)))
        assert len(batches[0]) == 8
        assert all(equal(first, second) for first, second in zip(*batches, strict=True))


class TestSeeds:
    @given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), min_size=2, max_size=20, unique=True))
    def test_distinct_parts_give_distinct_seeds(self, parts: list[tuple[int, int]]) -> None:
        seeds = [derive_seed(*part) for part in parts]
        assert len(set(seeds)) == len(parts)
        assert all(0 <= seed < 2**63 for seed in seeds)

    def test_is_the_same_on_every_machine(self) -> None:
        assert derive_seed(0, "epoch", 3) == 2196801750301329207


def test_captions_that_are_too_long_are_cut(tmp_path: Path, load: Any, tiny_processor: Processor) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("image,caption\na.png," + "a very long caption " * 20)
    prepare_pairs(tmp_path / "a.csv", tmp_path / "set")
    batch = load(tmp_path / "set")[BatchKey((0,), 0)]
    assert batch.input_ids.shape == (1, tiny_processor.config.max_length)
    assert batch.input_ids[0, -1] == tiny_processor.eos_token_id
    assert batch.attention_mask is None
