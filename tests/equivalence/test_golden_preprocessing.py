"""Case n: pictures as the official evaluation transforms prepare them."""

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

import tiny
from bridgetower.processor import Processor, ProcessorConfig
from bridgetower.processor.config import CLIP_MEAN, CLIP_STD

CASE = "n_preprocess"
PROFILES = {"clip": "official-pretrain", "blip": "official-finetune"}
ATOL = 1e-6


def prepared(profile: str, size: int, picture: Tensor) -> Tensor:
    processor = Processor(ProcessorConfig(profile=profile, image_size=size, max_length=8), None)
    return processor.images([picture.numpy()])[0]


def bilinear(kind: str, size: int, picture: Tensor) -> Tensor:
    sides = size if kind == "clip" else (size, size)
    resize = transforms.Resize(sides, InterpolationMode.BILINEAR)
    steps = [resize, transforms.CenterCrop(size), transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD)]
    return transforms.Compose(steps)(Image.fromarray(picture.numpy()))


def test_every_picture_under_every_transform_is_recorded(recorded):
    size = recorded.meta["size"]
    assert set(recorded.outputs) == {f"{kind}_{name}" for kind in PROFILES for name in recorded.meta["inputs"]}
    assert all(expected.shape == (3, size, size) for expected in recorded.outputs.values())


@pytest.mark.parametrize("kind", PROFILES)
def test_pictures(recorded, kind):
    (other,) = set(PROFILES) - {kind}
    size, swapped, coarse = recorded.meta["size"], 0.0, 0.0
    for name, picture in recorded.inputs.items():
        expected = recorded.outputs[f"{kind}_{name}"]
        torch.testing.assert_close(prepared(PROFILES[kind], size, picture), expected, atol=ATOL, rtol=0)
        swapped = max(swapped, tiny.off(prepared(PROFILES[other], size, picture), expected))
        coarse = max(coarse, tiny.off(bilinear(kind, size, picture), expected))
    assert min(swapped, coarse) > 0.1  # controls: the other profile, another interpolation
