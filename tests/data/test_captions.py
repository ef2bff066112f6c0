"""Captions as batches, also with false ones: pure functions of their key."""

import random
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from bridgetower.data.batches.batch import BatchKey, CaptionBatch, StepSampler
from bridgetower.data.batches.captions import CaptionImages, CaptionPairs, RankingPairs
from bridgetower.data.config import DataConfig, MaskingConfig
from bridgetower.data.sets import prepared_set
from bridgetower.data.sets.custom import prepare_custom
from bridgetower.data.sets.store import Table
from bridgetower.processor import load_items
from helpers.sets import caption_record, write_set


@pytest.fixture
def load_pairs(tiny_dataset, tiny_processor):
    """Makes the pairs of the set, or of other folders, under a data config."""

    def make(*folders, split="train", masking=0.3, **config):
        data = DataConfig(folders=tuple(map(str, folders or (tiny_dataset,))), **config)
        return CaptionPairs(
            CaptionImages(data, split, tiny_processor), MaskingConfig(probability=masking)
        )

    return make


def equal_batches(first, second):
    pairs = [
        (getattr(first, item.name), getattr(second, item.name)) for item in fields(CaptionBatch)
    ]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def identities(images, numbers):
    return images.draw_captions([], torch.Generator(), numbers).identities


class TestImages:
    def test_an_image_has_each_of_its_captions_once(self, load_pairs, tmp_path):
        draw = random.Random(0)
        captions = [draw.choices("abcdefgh", k=draw.randint(1, 9)) for _ in range(27)]
        write_set(
            tmp_path / "set",
            {"train": [caption_record(n, entries=texts) for n, texts in enumerate(captions)]},
        )
        pairs = load_pairs(tmp_path / "set")
        once = [list(dict.fromkeys(texts)) for texts in captions]
        # in an order that changes from process to process
        official = [set(texts) for texts in captions]
        assert len(pairs) == sum(map(len, official)) < sum(map(len, captions))
        assert pairs.images.all_captions() == pairs.images.captions(range(27)) == once
        owners = [row for row, texts in enumerate(once) for _ in texts]
        assert pairs.pairs.tolist() == [[row, number] for number, row in enumerate(owners)]
        texts, index = pairs.images.texts()
        assert (texts, index.tolist()) == ([text for texts in once for text in texts], owners)
        first, rows = pairs.images.texts(3)
        assert first == [text for texts in once for text in texts[:3]]
        assert rows.tolist() == [row for row, texts in enumerate(once) for _ in texts[:3]]

    def test_images_with_the_same_captions_share_them(self, load_pairs, tiny_dataset):
        alone = load_pairs(split="test").images
        twice = load_pairs(tiny_dataset, tiny_dataset, split="test").images
        assert alone.owners().tolist() == list(range(9))
        assert twice.owners().tolist() == [*range(9), *range(9)]
        assert twice.texts(2, twice.owners())[0] == alone.texts(2)[0]
        assert torch.equal(twice.texts(2, twice.owners())[1], alone.texts(2)[1])
        numbers = identities(twice, range(18))
        assert torch.equal(numbers[:9], numbers[9:])
        assert torch.equal(numbers[:9], identities(alone, range(9)))
        assert len(numbers.unique()) == 9
        assert torch.equal(*twice.pixels([12, 3]))
        assert twice.contents([12, 3]) == alone.contents([3]) * 2

    def test_cache_keeps_what_was_decoded(self, load_pairs, monkeypatch):
        for cache, decoded in ((True, 1), (False, 2)):
            images = load_pairs(cache=cache).images
            calls = []
            resize = images.processor.resize

            def counted(image, calls=calls, resize=resize):
                calls.append(1)
                return resize(image)

            monkeypatch.setattr(images.processor, "resize", counted)
            assert torch.equal(images.pixels([2])[0], images.pixels([2])[0])
            assert len(calls) == decoded
            monkeypatch.undo()

    def test_missing_folders(self, load_pairs, tmp_path, tiny_processor):
        with pytest.raises(ValueError, match=r"no data folder given; pass --data\.folders"):
            CaptionImages(DataConfig(), "train", tiny_processor)
        with pytest.raises(FileNotFoundError, match="nowhere"):
            load_pairs(tmp_path / "nowhere")

    def test_a_broken_picture_is_named(self, load_pairs, tmp_path):
        # as if the set was written when it could be decoded
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepared_set, "_read_image", lambda image: b"not a picture")
            write_set(tmp_path / "set", {"train": [caption_record(7)]})
        with pytest.raises(
            ValueError, match=rf"image train/7\.png of {tmp_path}/set: .*the image of 13 bytes"
        ):
            load_pairs(tmp_path / "set")[BatchKey((0,), 0)]


class TestPairs:
    def test_all_captions_or_one_drawn(self, load_pairs):
        everything = load_pairs()
        single = load_pairs(captions="one")
        assert len(everything) == sum(map(len, everything.images.all_captions()))
        assert len(single) == len(everything.images)
        image = next(
            row for row, captions in enumerate(single.images.all_captions()) if len(captions) == 2
        )
        drawn = {
            tuple(single[BatchKey((image,), seed)].input_ids[0].tolist()) for seed in range(20)
        }
        assert len(drawn) == 2

    def test_repeats(self, load_pairs, tiny_dataset):
        once = load_pairs()
        pairs = load_pairs(tiny_dataset, tiny_dataset, repeats=(1, 3))
        assert len(pairs) == 4 * len(once)
        counts = Counter(map(tuple, pairs.pairs.tolist()))
        assert {(image >= 27, count) for (image, _), count in counts.items()} == {
            (False, 1),
            (True, 3),
        }
        numbers = [number for image, number in pairs.pairs.tolist() if image == 30]
        assert (
            numbers
            == [number for number, image in enumerate(pairs.images.owner.tolist()) if image == 30]
            * 3
        )

    def test_batch_is_a_function_of_its_key(self, load_pairs):
        options = {"captions": "one", "augmentation": "affine", "word_dropout": 0.3}
        pairs = load_pairs(**options)
        key = BatchKey((3, 0, 11, 3), 17)
        first = pairs[key]
        _ = pairs[BatchKey((1, 2), 3)], torch.randn(5)
        torch.manual_seed(99)
        assert equal_batches(pairs[key], first)
        assert equal_batches(load_pairs(**options)[key], first)
        assert not equal_batches(pairs[BatchKey(key.examples, 18)], first)
        assert not equal_batches(pairs[BatchKey((3, 0, 11, 4), 17)], first)

    def test_content(self, load_pairs):
        pairs = load_pairs(masking=0.5)
        rows = (5, 0, 9)
        batch = pairs[BatchKey(rows, 1)]
        images = pairs.images
        image_rows, entry_numbers = pairs.pairs[list(rows)].T.tolist()
        assert torch.equal(batch.image_index, identities(images, image_rows))
        assert batch.ids == tuple(images.names(image_rows))
        assert torch.equal(batch.pixel_values, images.pixel_values(image_rows))
        captions = [row["entry"] for row in images.examples(entry_numbers)]
        texts = images.processor.texts(captions)
        assert torch.equal(batch.input_ids, texts.input_ids)
        assert torch.equal(batch.attention_mask, texts.attention_mask)
        hidden = batch.mlm_labels >= 0
        assert torch.equal(batch.mlm_labels[hidden], batch.input_ids[hidden])
        assert torch.equal(batch.masked_input_ids[~hidden], batch.input_ids[~hidden])
        assert 0 < int(hidden.sum()) < hidden.numel()
        special = torch.isin(batch.input_ids, torch.tensor(sorted(images.processor.special_ids)))
        assert not (hidden & special).any()
        assert len(batch) == 3
        assert batch.seed == 1

    def test_each_table_is_read_once_for_a_batch(self, load_pairs, monkeypatch):
        pairs = load_pairs(captions="one")
        read = []
        take = Table.take
        monkeypatch.setattr(
            Table,
            "take",
            lambda table, *arguments: read.append(Path(table.uri).name) or take(table, *arguments),
        )
        batch = pairs[BatchKey((3, 0, 11, 3), 17)]
        assert sorted(read) == ["examples.lance", "images.lance"]
        assert (
            batch.image_index.tolist()
            == identities(pairs.images, pairs.pairs[[3, 0, 11, 3], 0].tolist()).tolist()
        )

    def test_labels_of_a_step_are_counted_without_its_pictures(self, load_pairs, monkeypatch):
        pairs = load_pairs(captions="one", word_dropout=0.3, augmentation="affine")
        step = BatchKey((0, 1), 5), BatchKey((2, 3), 6), BatchKey((4, 5), 7)
        expected = sum(int(pairs[key].num_labels) for key in step)
        read = []
        views = CaptionImages.views
        monkeypatch.setattr(
            CaptionImages,
            "views",
            lambda images, rows, *arguments: read.extend(rows) or views(images, rows, *arguments),
        )
        batch = pairs[replace(step[0], step=step)]
        assert int(batch.step_labels) == expected > int(batch.num_labels)
        assert len(read) == 2
        assert equal_batches(replace(batch, step_labels=None), pairs[step[0]])

    def test_views_change_pictures_and_dropped_words_texts(self, load_pairs):
        key = BatchKey((0, 1, 2), 5)
        plain = load_pairs()[key]
        turned = load_pairs(augmentation="affine")[key]
        fewer = load_pairs(word_dropout=0.5)[key]
        assert not torch.equal(plain.pixel_values, turned.pixel_values)
        assert torch.equal(plain.masked_input_ids, turned.masked_input_ids)
        assert torch.equal(plain.pixel_values, fewer.pixel_values)
        assert fewer.input_ids.shape[1] < plain.input_ids.shape[1]

    @pytest.fixture
    def views_path(self, tmp_path):
        """A file with transforms of one's own."""
        (tmp_path / "views.py").write_text(
            "import torch\nnumber = 5\ndef invert(image): return 255 - image\ndef nothing(image): pass\n"
            "def noise(image): return torch.randint(0, 256, image.shape, dtype=torch.uint8)\n"
            "def floats(image): return image / 255\n"
        )
        return str(tmp_path / "views.py")

    def test_a_transform_of_ones_own(self, load_pairs, views_path):
        pairs = load_pairs(transform=f"{views_path}:invert")
        images = pairs.images
        rows = pairs.pairs[[0, 1, 2], 0].tolist()
        inverted = images.processor.normalise(255 - torch.stack(images.pixels(rows)))
        assert torch.equal(pairs[BatchKey((0, 1, 2), 5)].pixel_values, inverted)
        # not in evaluation
        torch.testing.assert_close(
            images.pixel_values(rows), load_pairs().images.pixel_values(rows)
        )

    def test_its_draws_are_those_of_the_key_and_leave_the_generator_alone(
        self, load_pairs, views_path
    ):
        pairs = load_pairs(transform=f"{views_path}:noise")
        before = torch.get_rng_state()
        first, again = (pairs[BatchKey((0, 1), 5)].pixel_values for _ in range(2))
        assert torch.equal(first, again)
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.equal(first[0], first[1])
        assert not torch.equal(first, pairs[BatchKey((0, 1), 6)].pixel_values)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "floats",
                r"floats returned torch.float32 \[3, \d+, \d+\]; expected a tensor of uint8",
            ),
            ("nothing", "nothing returned NoneType; expected a tensor of uint8"),
            ("number", "number is a int; expected"),
            ("missing", "data.transform is .*missing; expected .*invert, .*noise"),
        ],
    )
    def test_what_is_no_transform(self, load_pairs, views_path, name, message):
        with pytest.raises(ValueError, match=message):
            load_pairs(transform=f"{views_path}:{name}")[BatchKey((0,), 5)]

    def test_whole_words_are_hidden(self, load_pairs):
        torn = []
        for whole_word in (True, False):
            pairs = load_pairs()
            pairs.masking = MaskingConfig(probability=0.4, whole_word=whole_word)
            batch = pairs[BatchKey(tuple(range(20)), 0)]
            processor = pairs.images.processor
            hidden = batch.mlm_labels >= 0
            after_special = torch.isin(
                batch.input_ids[:, :-1], torch.tensor(list(processor.special_ids))
            )
            carries_on = processor.continues_word[batch.input_ids[:, 1:]] & ~after_special
            torn.append(int((carries_on & (hidden[:, 1:] != hidden[:, :-1])).sum()))
        assert torn[0] == 0 < torn[1]


def test_a_worker_makes_the_same_batches_of_a_copy_in_a_store(load_pairs, store, tiny_dataset):
    batches = []
    for workers, folder in ((0, tiny_dataset), (1, store.upload(tiny_dataset, "bucket/set"))):
        pairs = load_pairs(folder, captions="one", augmentation="affine", cache=True)
        sampler = StepSampler(len(pairs), batch_size=8, micro_batches=2, steps=range(2, 5), seed=4)
        torch.manual_seed(workers)
        batches.append(list(load_items(pairs.__getitem__, sampler, num_workers=workers)))
    assert len(batches[0]) == 6
    assert all(map(equal_batches, *batches))


def test_captions_that_are_too_long_are_cut(tmp_path, load_pairs, tiny_processor):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("image,caption\na.png," + "a very long caption " * 20)
    prepare_custom("pairs", tmp_path / "a.csv", tmp_path / "set")
    batch = load_pairs(tmp_path / "set")[BatchKey((0,), 0)]
    assert batch.input_ids.shape == (1, tiny_processor.config.max_length)
    assert batch.input_ids[0, -1] == tiny_processor.token_ids([""])[0][-1]
    assert batch.attention_mask is None


class TestRanking:
    """Images with a true and several false captions, never one of the own as false."""

    @pytest.fixture
    def images(self, load_pairs):
        return load_pairs().images

    @staticmethod
    def texts(pairs, *key):
        return [pairs.images.processor.decode(row) for row in pairs[BatchKey(*key)].input_ids]

    def test_the_true_caption_comes_first(self, images):
        pairs = RankingPairs(images, false_texts=3)
        assert len(pairs) == images.num_examples
        texts = self.texts(pairs, (4, 0), 7)
        true_pairs = images.pairs()[[4, 0]].tolist()
        assert len(texts) == 8
        assert [texts[0], texts[4]] == [
            row["entry"] for row in images.examples([number for _, number in true_pairs])
        ]
        expected = identities(images, [image for image, _ in true_pairs])
        assert torch.equal(pairs[BatchKey((4, 0), 7)].image_index, expected)

    def test_false_captions_are_any_of_other_images(self, images):
        pairs = RankingPairs(images, false_texts=15)
        seen = set()
        for seed in range(12):
            false = self.texts(pairs, (seed,), seed)[1:]
            assert not set(false) & set(images.captions([int(images.pairs()[seed, 0])])[0])
            seen |= set(false)
        assert len(seen) > len(images)  # and not only the first caption of an image

    def test_batch_is_a_function_of_its_key(self, images):
        images.config = replace(images.config, augmentation="affine")
        pairs = RankingPairs(images, false_texts=2)
        key = BatchKey((3, 0), 17)
        first = pairs[key]
        torch.manual_seed(99)
        again = pairs[key]
        other = pairs[BatchKey((3, 0), 18)]
        assert torch.equal(first.pixel_values, again.pixel_values)
        assert torch.equal(first.input_ids, again.input_ids)
        assert (first.ids, first.seed) == (again.ids, again.seed)
        assert not torch.equal(first.pixel_values, other.pixel_values)

    def test_images_with_the_same_captions_are_one(self, load_pairs, tmp_path):
        words = ["red", "blue", "red", "bar", "red", "blue"]
        for name, captions in (("set", words), ("one", ["red"]), ("same", ["red"] * 3)):
            rows = [caption_record(number, entries=[text]) for number, text in enumerate(captions)]
            write_set(tmp_path / name, {"train": rows})
        pairs = RankingPairs(load_pairs(tmp_path / "set").images, false_texts=60)
        for example, word in enumerate(words):
            true, *false = self.texts(pairs, (example,), example)
            assert true == word
            assert {other: false.count(other) > 5 for other in false} == dict.fromkeys(
                set(words) - {word}, True
            )
        for name in ("one", "same"):
            with pytest.raises(ValueError, match="train has no two images with different captions"):
                RankingPairs(load_pairs(tmp_path / name).images, false_texts=1)
