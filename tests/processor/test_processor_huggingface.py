"""Preprocessing files of transformers: read with every setting carried out or refused, and written back."""

import dataclasses
import json
import logging
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tokenizers import normalizers

pytest.importorskip("transformers")

from transformers import (
    AutoProcessor,
    BridgeTowerConfig,
    BridgeTowerImageProcessor,
    BridgeTowerProcessor,
)

from bridgetower.processor import Processor, ProcessorConfig, train_tokenizer

HUB = {
    **dict.fromkeys(("do_center_crop", "do_normalize", "do_pad", "do_rescale", "do_resize"), True),
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "BridgeTowerImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 288},
    "size_divisor": 32,
}
TEXTS = ["A dog runs", "two  dogs <mask> on the grass, don't", " 犬 🐕 É", ""]


def _folder(path, settings, name="preprocessor_config.json"):
    path.mkdir(exist_ok=True)
    (path / name).write_text(json.dumps(settings))
    return path


def test_hub_settings(photo, tmp_path):
    processor = Processor.from_huggingface(_folder(tmp_path, HUB), patch_size=16)
    sizes = {"image_size": 288, "max_length": 512, "patch_size": 16, "size_divisor": 32}
    assert processor.config == ProcessorConfig(profile="hf", **sizes)
    assert processor.tokenizer is None
    expected = BridgeTowerImageProcessor.from_pretrained(tmp_path)(
        photo(100, 333), return_tensors="pt"
    ).pixel_values
    assert torch.equal(processor.images([photo(100, 333)]), expected)


def test_bilinear(photo, tmp_path):
    processor = Processor.from_huggingface(_folder(tmp_path, HUB | {"resample": 2}), patch_size=16)
    image = photo(400, 333)
    expected = BridgeTowerImageProcessor.from_pretrained(tmp_path)(
        image, return_tensors="pt"
    ).pixel_values
    assert torch.equal(processor.images([image]), expected)
    bicubic = replace(processor.config, interpolation="bicubic")
    assert not torch.equal(Processor(bicubic, None).images([image]), expected)
    processor.save_huggingface(tmp_path / "back")
    assert json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())["resample"] == 2


def test_an_absent_crop_is_as_large_as_the_short_side(photo, tmp_path):
    folder = _folder(tmp_path, HUB | {"size": {"shortest_edge": 294}})
    processor = Processor.from_huggingface(folder, patch_size=14)
    assert processor.config.image_size == 294
    image = photo(400, 500)
    cropped = BridgeTowerImageProcessor(
        size={"shortest_edge": 294}, crop_size={"shortest_edge": 294}
    )
    assert torch.equal(processor.images([image]), cropped(image, return_tensors="pt").pixel_values)
    default = BridgeTowerImageProcessor.from_pretrained(folder)(
        image, return_tensors="pt"
    ).pixel_values
    assert default.shape[-1] == 288, "what the model of 294 px cannot take"


def test_settings_that_are_carried_out(tmp_path):
    for settings, fields in (
        ({"crop_size": {"shortest_edge": 256}}, {"image_size": 256, "shortest_edge": 288}),
        ({"crop_size": 256}, {"image_size": 256, "shortest_edge": 288}),
        ({"crop_size": {"height": 288, "width": 288}}, {"image_size": 288, "shortest_edge": None}),
        ({"size": 320, "crop_size": None}, {"image_size": 320}),
        ({"size_divisor": 16}, {"size_divisor": 16}),
        ({"do_convert_rgb": True}, {"background": (255, 255, 255)}),
        ({"do_convert_rgb": None, "pad_size": None}, {"background": None}),
        ({"do_pad": False}, {"profile": "hf"}),
        ({"image_mean": [0.5, 0.5, 0.5]}, {"image_mean": (0.5, 0.5, 0.5)}),
        (
            {"_valid_processor_keys": ["images"], "processor_class": "BridgeTowerProcessor"},
            {"profile": "hf"},
        ),
    ):
        config = Processor.from_huggingface(_folder(tmp_path, HUB | settings), patch_size=16).config
        assert {name: getattr(config, name) for name in fields} == fields


def test_settings_that_would_be_ignored_are_refused(tmp_path):
    for name, value in (
        *((name, False) for name in ("do_resize", "do_rescale", "do_normalize", "do_center_crop")),
        *(("resample", 0), ("rescale_factor", 1.0), ("pad_size", {"height": 300, "width": 300})),
        *(
            ("size", {"shortest_edge": 288, "longest_edge": 400}),
            ("size", {"height": 288, "width": 300}),
        ),
        *(("crop_size", "288"), ("image_mean", 0.5), ("some_new_setting", 1)),
        ("image_processor_type", "ViltImageProcessor"),
    ):
        message = rf"preprocessor_config\.json (sets {name} to|is for ViltImageProcessor)"
        with pytest.raises(ValueError, match=message):
            Processor.from_huggingface(_folder(tmp_path, HUB | {name: value}), patch_size=16)


def test_nested_settings_win_as_in_transformers(tmp_path):
    _folder(tmp_path, HUB)
    _folder(tmp_path, {"image_processor": HUB | {"size_divisor": 16}}, "processor_config.json")
    assert Processor.from_huggingface(tmp_path, patch_size=16).config.size_divisor == 16
    assert BridgeTowerImageProcessor.from_pretrained(tmp_path).size_divisor == 16
    _folder(tmp_path, {"processor_class": "BridgeTowerProcessor"}, "processor_config.json")
    assert Processor.from_huggingface(tmp_path, patch_size=16).config.size_divisor == 32


def test_no_settings_and_a_size_that_the_model_cannot_take(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image settings"):
        Processor.from_huggingface(tmp_path, patch_size=16)
    with pytest.raises(
        ValueError,
        match=r"288 is not a multiple of the patch size 14; set image_size to 280 or 294",
    ):
        Processor.from_huggingface(_folder(tmp_path, HUB), patch_size=14)


def test_the_text_limit_comes_from_the_tokenizer(tmp_path):
    _folder(tmp_path, HUB)
    for limit, expected in ((77, 77), (int(1e30), 512), (None, 512)):
        _folder(tmp_path, {"model_max_length": limit}, "tokenizer_config.json")
        assert Processor.from_huggingface(tmp_path, patch_size=16).config.max_length == expected
        assert (
            Processor.from_huggingface(tmp_path, patch_size=16, max_length=50).config.max_length
            == 50
        )


def _hf_config(**fields):
    return ProcessorConfig(
        **({"profile": "hf", "image_size": 96, "max_length": 20, "patch_size": 16} | fields)
    )


@pytest.mark.parametrize(
    ("fields", "with_model_config"),
    [({}, True), ({"image_size": 112, "shortest_edge": 128, "size_divisor": 8}, False)],
)
def test_transformers_reads_what_was_written(fields, with_model_config, tokenizer, photo, tmp_path):
    ours = Processor(_hf_config(**fields), tokenizer)
    ours.save_huggingface(tmp_path)
    if with_model_config:
        BridgeTowerConfig().save_pretrained(tmp_path)
    for theirs in (
        AutoProcessor.from_pretrained(tmp_path),
        BridgeTowerProcessor.from_pretrained(tmp_path),
    ):
        assert isinstance(theirs, BridgeTowerProcessor)
        for shape in [(100, 130), (97, 301), (60, 40)]:
            batch = theirs(photo(*shape), TEXTS[0], return_tensors="pt")
            assert torch.equal(batch.pixel_values, ours.images([photo(*shape)]))
        batch = ours.texts(TEXTS)
        encoded = theirs.tokenizer(TEXTS, padding=True, return_tensors="pt")
        assert encoded.keys() == {"input_ids", "attention_mask"}
        assert torch.equal(encoded.input_ids, batch.input_ids)
        assert torch.equal(encoded.attention_mask, batch.attention_mask)
        long = "a dog runs " * 20
        assert [theirs.tokenizer(long, truncation=True).input_ids] == ours.token_ids(
            [long], truncate=True
        )
        assert theirs.tokenizer.mask_token_id == ours.mask_token_id


def test_a_call_returns_the_tensors_of_transformers(tokenizer, photo, tmp_path):
    ours = Processor(_hf_config(max_length=40), tokenizer)
    ours.save_huggingface(tmp_path)
    theirs = BridgeTowerProcessor.from_pretrained(tmp_path)
    images = [photo(100, 130), photo(60, 40), photo(97, 301), photo(96, 96)]
    for options in (
        {"padding": True},
        {"padding": True, "truncation": True, "max_length": 7},
        {"padding": "max_length", "truncation": "do_not_truncate"},
        {"padding": "longest", "truncation": "longest_first", "max_length": 7},
        {"padding": "max_length", "truncation": "only_first", "max_length": 9},
    ):
        for arguments in ((images, TEXTS), (images[0], TEXTS[0]), (None, TEXTS)):
            expected, inputs = (
                processor(*arguments, return_tensors="pt", **options)
                for processor in (theirs, ours)
            )
            assert {name: value.dtype for name, value in inputs.items()} == {
                n: v.dtype for n, v in expected.items()
            }
            assert all(torch.equal(tensor, inputs[name]) for name, tensor in expected.items())
    assert ours(images=images).keys() == {"pixel_values", "pixel_mask"}
    assert ours(images, TEXTS, padding=True).to("cpu").input_ids.shape[0] == 4


def test_calls_that_have_no_tensors(tokenizer, photo):
    processor = Processor(_hf_config(), tokenizer)
    image = photo(60, 40)
    for arguments, options, words in (
        ((None, None), {}, "neither images nor text given"),
        ((image, TEXTS[0]), {"return_tensors": "np"}, "return_tensors is 'np'; expected one of pt"),
        ((image, TEXTS), {}, "different numbers of tokens; pass padding=True"),
        ((image, "a dog runs " * 20), {}, "the limit is 20; shorten it, or pass truncation=True"),
        (
            (image, TEXTS),
            {"padding": "do_not_pad"},
            "different numbers of tokens; pass padding=True",
        ),
        ((image, "a dog runs " * 20), {"truncation": "do_not_truncate"}, "the limit is 20"),
        (
            (image, "a dog"),
            {"padding": "left"},
            "padding is 'left'; expected one of False, True, do_not_pad, longest",
        ),
        (
            (image, "a dog"),
            {"truncation": "only_second"},
            "truncation is 'only_second'; expected one of False, True",
        ),
        ((image, "a dog"), {"max_length": 21}, "max_length is 21; expected 3 to 20"),
        (([], "a dog"), {}, "no images given"),
    ):
        with pytest.raises(ValueError, match=words):
            processor(*arguments, **options)
    with pytest.raises(ValueError, match="no tokenizer"):
        Processor(_hf_config(), None)(image, "a dog")
    with pytest.raises(
        AttributeError, match="no pixel_values here; there are input_ids, attention_mask"
    ):
        _ = processor(text="a dog").pixel_values


def test_a_lower_casing_tokenizer_stays_one_in_transformers(tmp_path):
    tokenizer = train_tokenizer(["a dog", "a dog"], vocab_size=270)
    tokenizer.normalizer = normalizers.Lowercase()
    ours = Processor(_hf_config(), tokenizer)
    ours.save_huggingface(tmp_path)
    BridgeTowerConfig().save_pretrained(tmp_path)
    theirs = AutoProcessor.from_pretrained(tmp_path).tokenizer
    assert [theirs(text).input_ids for text in ("A DOG", "a dog")] == ours.token_ids(
        ["A DOG", "a dog"]
    )


def test_what_transformers_wrote_is_read(tokenizer, photo, tmp_path):
    Processor(_hf_config(), tokenizer).save_huggingface(tmp_path / "first")
    theirs = AutoProcessor.from_pretrained(tmp_path / "first")
    theirs.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "processor_config.json").exists()
    ours = Processor.from_huggingface(tmp_path / "second", patch_size=16)
    expected = theirs.image_processor(photo(80, 130), return_tensors="pt")["pixel_values"]
    assert torch.equal(ours.images([photo(80, 130)]), expected)
    assert ours.token_ids(TEXTS) == theirs.tokenizer(TEXTS).input_ids
    assert ours.config.max_length == 20


@pytest.mark.parametrize("profile", ["official-pretrain", "official-finetune", "hf"])
def test_written_settings_come_back(profile, tokenizer, tmp_path):
    for background in (None, (255, 255, 255)):
        config = _hf_config(profile=profile, background=background)
        Processor(config, tokenizer).save_huggingface(tmp_path)
        back = Processor.from_huggingface(tmp_path, patch_size=16)
        assert back.config.resize_divisor == config.resize_divisor
        assert replace(back.config, size_divisor=None) == config
        assert back.token_ids(TEXTS) == Processor(config, tokenizer).token_ids(TEXTS)


def test_official_profiles_are_nearly_the_same_in_transformers_and_say_so(
    tokenizer, photo, tmp_path, caplog
):
    level = 1.01 / 255 / 0.26130258
    for profile, shape in (
        ("official-finetune", (97, 201)),
        ("official-pretrain", (96 * 2, 100 * 2)),
    ):
        ours = Processor(_hf_config(profile=profile), tokenizer)
        with caplog.at_level(logging.WARNING):
            ours.save_huggingface(tmp_path / profile)
        assert f"cannot repeat profile '{profile}' exactly" in caplog.text
        theirs = AutoProcessor.from_pretrained(tmp_path / profile)
        pixels = theirs(photo(*shape), "a", return_tensors="pt").pixel_values
        difference = (pixels - ours.images([photo(*shape)])).abs().max()
        assert 1e-3 < difference < level


def test_transparent_pictures_are_white_or_refused_in_transformers(tokenizer, tmp_path):
    clear = Image.new("RGBA", (96, 96))
    white = Processor(_hf_config(background=(255, 255, 255)), tokenizer)
    white.save_huggingface(tmp_path / "white")
    theirs = AutoProcessor.from_pretrained(tmp_path / "white").image_processor
    assert torch.equal(theirs(clear, return_tensors="pt").pixel_values, white.images([clear]))
    Processor(_hf_config(), tokenizer).save_huggingface(tmp_path / "none")
    theirs = AutoProcessor.from_pretrained(tmp_path / "none").image_processor
    with pytest.raises((ValueError, RuntimeError)):
        theirs(clear, return_tensors="pt")
    with pytest.raises(ValueError, match=r"background is \(0, 0, 9\), there \(255, 255, 255\)"):
        Processor(_hf_config(background=(0, 0, 9)), tokenizer).save_huggingface(tmp_path / "blue")


def test_every_field_of_the_settings_comes_back_or_is_named(tokenizer, tmp_path, caplog):
    changes = {
        "profile": "official-finetune",
        "image_size": 64,
        "max_length": 9,
        "interpolation": "bilinear",
        "image_mean": (0.1, 0.2, 0.3),
        "image_std": (0.4, 0.5, 0.6),
        "patch_size": 8,
        "background": (0, 0, 9),
        "shortest_edge": 128,
        "size_divisor": 8,
        "fast_decode": True,
    }
    assert changes.keys() == {item.name for item in dataclasses.fields(ProcessorConfig)}
    del changes["background"]  # of which the test above tells
    for name, value in changes.items():
        config = _hf_config(**{name: value})
        caplog.clear()
        Processor(config, tokenizer).save_huggingface(tmp_path / name)
        back = Processor.from_huggingface(tmp_path / name, patch_size=config.patch_size)
        assert getattr(back.config, name) == value or name in caplog.text, name


def test_nothing_is_written_beside_settings_that_would_win(tokenizer, tmp_path):
    _folder(tmp_path, {"image_processor": HUB}, "processor_config.json")
    with pytest.raises(ValueError, match="remove it first"):
        Processor(_hf_config(), tokenizer).save_huggingface(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["processor_config.json"]


def test_other_clip_settings_are_refused(tmp_path):
    edge = {"size": {"shortest_edge": 96}}
    square = {"size": {"height": 96, "width": 96}}
    small = {"crop_size": {"height": 80, "width": 80}}
    unsupported = (
        edge | {"do_center_crop": False},
        edge | small,
        square | small,
        square | {"do_center_crop": True},
    )
    for settings in (*unsupported, edge | {"crop_size": 96, "do_pad": True}):
        _folder(tmp_path, {"image_processor_type": "CLIPImageProcessor"} | settings)
        with pytest.raises(ValueError, match=r"resizes to|sets do_pad"):
            Processor.from_huggingface(tmp_path, patch_size=16)
