"""Settings, saving and loading, and what a processor without a tokenizer refuses."""

import json
import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from bridgetower.processor import Processor, ProcessorConfig


def test_saved_and_loaded_processors_are_equal(tokenizer, photo, tmp_path):
    sizes = {
        "image_size": 48,
        "shortest_edge": 64,
        "size_divisor": 8,
        "max_length": 30,
        "patch_size": 16,
    }
    values = {"background": (1, 2, 3), "image_mean": (0.1, 0.2, 0.3), "image_std": (0.4, 0.5, 0.6)}
    config = ProcessorConfig(profile="hf", **sizes, **values)
    saved = Processor(config, tokenizer)
    saved.save(tmp_path)
    loaded = Processor.load(tmp_path)
    assert loaded.config == config
    assert torch.equal(loaded.images([photo(40, 60)]), saved.images([photo(40, 60)]))
    texts = ["A dog", "犬 <mask>"]
    assert torch.equal(loaded.texts(texts).input_ids, saved.texts(texts).input_ids)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["processor.json", "tokenizer.json"]


@pytest.mark.parametrize("profile", ["official-pretrain", "official-finetune", "hf"])
def test_fast_decoding(profile, photo, tmp_path):
    config = ProcessorConfig(profile=profile, image_size=48, max_length=20, fast_decode=True)
    fast = Processor(config, None)
    full = Processor(replace(config, fast_decode=False), None)
    large = tmp_path / "large.jpg"
    small = tmp_path / "small.jpg"
    photo(400, 600).save(large, quality=95)
    photo(180, 180).save(small, quality=95)  # half of it is less than twice the size that is needed
    assert torch.equal(fast.resize(small), full.resize(small))
    off = (fast.resize(large).int() - full.resize(large).int()).abs()
    assert 0 < off.float().mean() < 2
    assert off.max() < 32
    assert (fast.prepare(large).width, fast.prepare(large).height) == (600, 400)
    fast.save(tmp_path)
    assert Processor.load(tmp_path).config.fast_decode


def test_a_processor_without_tokenizer_stays_without(config, tmp_path):
    (tmp_path / "tokenizer.json").write_text("left over")
    Processor(config, None).save(tmp_path)
    assert Processor.load(tmp_path).tokenizer is None


def test_text_needs_a_tokenizer(config):
    processor = Processor(config, None)
    attributes = (
        partial(getattr, processor, name) for name in ("mask_token", "special_ids", "vocab_size")
    )
    for read in (lambda: processor.texts(["a"]), lambda: processor.decode([0]), *attributes):
        with pytest.raises(ValueError, match="no tokenizer; build it with"):
            read()


def test_loading_refuses_what_it_does_not_know(config, tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"processor\.json"):
        Processor.load(tmp_path)
    Processor(config, tokenizer).save(tmp_path)
    path = tmp_path / "processor.json"
    values = json.loads(path.read_text())
    changes = [
        (values | {"version": 2}, "version 2"),
        (values | {"extra": 1}, "extra"),
        (values | {"config": values["config"] | {"flip": True}}, r"unknown fields \['flip'\]"),
        (values | {"config": {"profile": "hf"}}, "lacks"),
        (values | {"config": values["config"] | {"image_size": "32"}}, "image_size is '32'"),
    ]
    for changed, message in changes:
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            Processor.load(tmp_path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="holds a list"):
        Processor.load(tmp_path)
    path.write_text(json.dumps(values))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Processor.load(tmp_path)


def test_impossible_settings(config):
    for changes, message in (
        ({"profile": "clip"}, "profile is 'clip'; expected one of official-pretrain"),
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": 32.0}, "image_size is 32.0"),
        (
            {"image_size": 290},
            "290 is not a multiple of the patch size 16; set image_size to 288 or 304",
        ),
        (
            {"image_size": 10},
            "10 is not a multiple of the patch size 16; set image_size to 16 or 32",
        ),
        ({"image_size": 294, "patch_size": 16}, "image_size to 288 or 304"),
        ({"patch_size": -1}, "patch_size is -1"),
        ({"max_length": 2}, "max_length is 2"),
        ({"image_std": (0.0, 1.0, 1.0)}, "from 0.001 to 1,000"),
        ({"image_mean": (0.5, float("nan"), 0.5)}, "three values"),
        ({"image_mean": (0.5,)}, "three values"),
        ({"background": (0, 0, 256)}, "background"),
        ({"background": (0, 0)}, "background"),
        (
            {"shortest_edge": 40},
            "shortest_edge is 40, which profile 'official-pretrain' does not use",
        ),
        ({"size_divisor": 32}, "size_divisor is 32, which"),
        ({"profile": "hf", "image_size": 16}, "below size_divisor 32"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(config, **changes)


def test_another_image_size(config, tokenizer, photo):
    larger = Processor(config, tokenizer).with_image_size(64)
    assert larger.images([photo(20, 30)]).shape == (1, 3, 64, 64)
    assert larger.tokenizer is tokenizer
    with pytest.raises(ValueError, match="set image_size to 32 or 48"):
        Processor(config, tokenizer).with_image_size(40)
    apart = ProcessorConfig(profile="hf", image_size=48, shortest_edge=64, max_length=9)
    with pytest.raises(ValueError, match="shortest_edge 64 was set apart"):
        Processor(apart, None).with_image_size(96)
    assert Processor(apart, None).with_image_size(48).config == apart
    assert Processor(apart, None).with_image_size(64).config == replace(
        apart, image_size=64, shortest_edge=None
    )


def test_lists_of_images(config, photo, tmp_path):
    processor = Processor(config, None)
    with pytest.raises(ValueError, match="no images"):
        processor.images([])
    singles = [
        photo(4, 5),
        str(tmp_path),
        b"x",
        np.zeros((4, 5, 3), np.uint8),
        torch.zeros(3, 4, 5),
    ]
    for single in singles:
        with pytest.raises(ValueError, match=r"one image .*pass \[image\]"):
            processor.images(single)
    with pytest.raises(
        ValueError, match="image 1: the image of 1 bytes cannot be read as an image"
    ):
        processor.images([photo(4, 5), b"x"])
    with pytest.raises(FileNotFoundError, match="no image file"):
        processor.images([tmp_path / "nothing.png"])


def test_a_prepared_picture_counts_as_an_image(config, photo, tmp_path):
    processor = Processor(config, None)
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    picture = photo(40, 60)
    picture.save(path, exif=exif)
    prepared = pickle.loads(pickle.dumps(processor.prepare(path)))
    assert (prepared.width, prepared.height) == (picture.height, picture.width)
    assert torch.equal(prepared.pixels, processor.resize(path))
    assert torch.equal(processor.images([prepared, path]), processor.images([path, path]))
    with pytest.raises(ValueError, match="pass \\[image\\]"):
        processor.images(prepared)
    other = processor.with_image_size(48)
    with pytest.raises(
        ValueError, match=r"prepared as \[3, 32, 32\]; this model takes \[3, 48, 48\]"
    ):
        other.images([prepared])
