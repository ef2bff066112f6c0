"""The three profiles against torchvision's transforms and transformers."""

from dataclasses import replace

import PIL
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from bridgetower.processor import Processor, ProcessorConfig
from bridgetower.processor.config import CLIP_MEAN, CLIP_STD

PROFILES = {"clip": "official-pretrain", "blip": "official-finetune"}
# squashed to 96 px, the height loses more than twice what the width does
TALL = [
    (800, 200),
    (117, 106),
    (240, 90),
]
SHAPES = [
    (120, 200),
    (301, 199),
    (96, 96),
    (333, 334),
    (480, 640),
    (200, 800),
    (37, 91),
    (5, 3),
    (1, 1),
    (116, 106),
]

VERTICALLY_FIRST = [*(("blip", shape) for shape in TALL), ("clip", (800, 200))]
PILLOW = int(PIL.__version__.split(".")[0])


def _processor(profile, size, **fields):
    return Processor(
        ProcessorConfig(profile=profile, image_size=size, max_length=8, **fields), None
    )


def _official(kind, size):
    """The official transform, spelled with torchvision's first transforms API as it was then."""
    resizing = (
        [transforms.Resize(size, InterpolationMode.BICUBIC), transforms.CenterCrop(size)]
        if kind == "clip"
        else [transforms.Resize((size, size), InterpolationMode.BICUBIC)]
    )
    return transforms.Compose(
        [*resizing, transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD)]
    )


def _lying(kind, size, picture):
    """The official transform of the picture turned on its side, turned back: vertically first in every Pillow."""
    turned = _official(kind, size)(picture.transpose(Image.Transpose.TRANSPOSE))
    return turned.mT


@pytest.mark.parametrize("kind", PROFILES)
@pytest.mark.parametrize("shape", [*SHAPES, *TALL])
def test_official_profiles_equal_torchvision(kind, shape, photo):
    """A Pillow before 13 shrinks vertically first only what lies on its side."""
    picture = photo(*shape)
    actual = _processor(PROFILES[kind], 96).images([picture])[0]
    lying = _lying(kind, 96, picture)
    vertically_first = (kind, shape) in VERTICALLY_FIRST
    if vertically_first:
        torch.testing.assert_close(actual, lying, atol=1e-6, rtol=0)
    if PILLOW >= 13 or not vertically_first:
        torch.testing.assert_close(actual, _official(kind, 96)(picture), atol=1e-6, rtol=0)
    if kind == "blip" and shape in ((301, 199), (480, 640), (116, 106)):
        assert (actual - lying).abs().max() > 0.01, (
            "control: the order shows, and a level is 0.014 to 0.015"
        )


def test_an_odd_surplus_shows_how_the_crop_rounds(photo):
    picture = photo(96, 131)  # 35 columns too many, torchvision leaves 18 on the left
    pixels = _processor("official-pretrain", 96).resize(picture)
    every_column = transforms.functional.pil_to_tensor(picture)
    assert torch.equal(pixels, every_column[:, :, 18 : 18 + 96])
    assert not torch.equal(pixels, every_column[:, :, 17 : 17 + 96])


HF_CASES = [
    (  # 45 rows or columns in a square of 64: the 19 missing ones are split unevenly
        {"size": {"shortest_edge": 45}, "crop_size": {"shortest_edge": 64}, "size_divisor": 3},
        {"size": 64, "shortest_edge": 45, "size_divisor": 3},
    ),
    ({}, {"size": 288}),
    ({"size": {"shortest_edge": 294}, "crop_size": {"shortest_edge": 294}}, {"size": 294}),
    (
        {"size": {"shortest_edge": 101}, "crop_size": {"shortest_edge": 64}, "size_divisor": 3},
        {"size": 64, "shortest_edge": 101, "size_divisor": 3},
    ),
]


@pytest.mark.parametrize("shape", SHAPES + TALL)
def test_hf_profile_equals_transformers_bit_for_bit(shape, photo):
    transformers = pytest.importorskip("transformers")
    picture = photo(*shape)
    for theirs, ours in HF_CASES:
        expected = transformers.BridgeTowerImageProcessor(**theirs)(
            picture, return_tensors="pt"
        ).pixel_values
        assert torch.equal(_processor("hf", **ours).images([picture]), expected)


def test_hf_comparison_sees_another_crop_and_another_interpolation(photo):
    transformers = pytest.importorskip("transformers")
    picture = photo(480, 640)
    bilinear = transformers.BridgeTowerImageProcessor(resample=2)(
        picture, return_tensors="pt"
    ).pixel_values
    ours = _processor("hf", 288).images([picture])
    assert (ours - bilinear).abs().max() > 1e-2
    # 71 rows too many: 35.5 becomes 36 there, 35 here
    pixels = transforms.functional.pil_to_tensor(photo(135, 101))
    hf = _processor("hf", 64, shortest_edge=101, size_divisor=1)
    assert torch.equal(hf.resize(photo(135, 101)), pixels[:, 35 : 35 + 64, 18 : 18 + 64])
    assert not torch.equal(
        hf.resize(photo(135, 101)), transforms.functional.center_crop(pixels, [64, 64])
    )


def test_normalise():
    config = replace(
        _processor("hf", 32).config, image_mean=(0.5, 0.0, 1.0), image_std=(0.5, 1.0, 2.0)
    )
    processor = Processor(config, None)
    white = processor.normalise(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))
    assert white.flatten().tolist() == [1.0, 1.0, 0.0]
    for pixels in (torch.zeros(1, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"expected uint8 \[batch, 3, h, w\]"):
            processor.normalise(pixels)


def test_elongated_pictures_fail_instead_of_vanishing_or_filling_the_memory():
    strip = Image.new("RGB", (5000, 20))
    with pytest.raises(ValueError, match="5000x20 is too elongated for profile 'hf'"):
        _processor("hf", 288).images([strip])
    with pytest.raises(ValueError, match="20000x1 is too elongated"):
        _processor("official-pretrain", 288).images([Image.new("RGB", (20000, 1))])
    assert _processor("official-finetune", 288).images([strip]).shape == (1, 3, 288, 288)
