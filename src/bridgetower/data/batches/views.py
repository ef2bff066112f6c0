"""Random views of training images and captions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from bridgetower.data.config import Augmentation, DataConfig, RandAugment
from bridgetower.extras import load_object
from bridgetower.processor import Processor, open_image, to_tensor

_SIGNED = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


@dataclass(frozen=True)
class Policy:
    """What may happen to an image."""

    ops: Mapping[str, tuple[float, float]]  # value of each change at magnitude 0 and at the highest
    highest: int  # magnitude
    probability: float  # of each drawn change to be made
    fill: int  # grey level of what comes into the image from outside
    bilinear: bool  # where pixels are moved, interpolate as OpenCV does; else take the nearest as Pillow does


_GEOMETRY = {"rotate": (0.0, 30.0), "shear_x": (0.0, 0.3), "shear_y": (0.0, 0.3)}

POLICIES: Mapping[RandAugment, Policy] = {
    # Official `blip_randaug` and `blip_randaug_wohf`, after BLIP's transform/randaugment.py.
    "geometry": Policy(
        {
            **dict.fromkeys(("identity", "autocontrast", "equalize"), (0.0, 0.0)),
            **dict.fromkeys(("brightness", "sharpness"), (0.1, 1.9)),
            **_GEOMETRY,
            **dict.fromkeys(("translate_x", "translate_y"), (0.0, 10.0)),
        },
        highest=10,
        probability=0.5,
        fill=128,
        bilinear=True,
    ),
    # Official `blip_randaug_wc` and `clip_randaug`, after ViLT's transforms/randaug.py.
    "colour": Policy(
        {
            **dict.fromkeys(("autocontrast", "equalize"), (0.0, 0.0)),
            **{"posterize": (0.0, 4.0), "solarize": (0.0, 256.0), "solarize_add": (0.0, 110.0)},
            **dict.fromkeys(("colour", "contrast", "brightness", "sharpness"), (0.1, 1.9)),
            **_GEOMETRY,
            **dict.fromkeys(("translate_x", "translate_y"), (0.0, 100.0)),
        },
        highest=30,
        probability=1.0,
        fill=0,
        bilinear=False,
    ),
}


def random_view(
    content: bytes, config: DataConfig, processor: Processor, generator: torch.Generator
) -> UInt8[Tensor, "3 h w"]:
    """Returns an image at the model's size after the random changes of the config.

    With `random_crop` a part of the image is resized to the square, mirrored and changed; without it the image is
    changed first and resized as in evaluation. Both as in official src/transforms/transform.py.
    """
    image = open_image(content, background=processor.config.background)
    size = processor.config.image_size
    if config.random_crop is not None:
        image = _crop(image, size, config.random_crop, generator)
    if config.flip and torch.rand((), generator=generator) < 0.5:
        image = ImageOps.mirror(image)
    image = rand_augment(image, config.rand_augment, config.rand_magnitude, generator)
    if config.random_crop is None:
        return processor.resize(image)
    return to_tensor(image).contiguous()


@cache
def custom_transform(place: str) -> Callable[[Tensor], Any]:
    found: Callable[[Tensor], Any] = load_object("data.transform", place, Callable)
    return found


def transformed(
    pixels: UInt8[Tensor, "b 3 h w"], place: str, generator: torch.Generator
) -> UInt8[Tensor, "b 3 h w"]:
    """Returns images after a custom function, each with its own draws from PyTorch's generator."""
    transform = custom_transform(place)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        changed = [transform(image) for image in pixels]
    for image in changed:
        if (
            not isinstance(image, Tensor)
            or image.dtype != torch.uint8
            or image.shape != pixels.shape[1:]
        ):
            found = (
                f"{image.dtype} {list(image.shape)}"
                if isinstance(image, Tensor)
                else type(image).__name__
            )
            raise ValueError(
                f"{place} returned {found}; expected a tensor of uint8 {list(pixels.shape[1:])}"
            )
    return torch.stack(changed)


def _crop(
    image: Image.Image, size: int, smallest: float, generator: torch.Generator
) -> Image.Image:
    """Resizes a random part as torchvision's `RandomResizedCrop`: `smallest` of the area or more, sides 3:4 to 4:3."""
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        share, shape = torch.rand(2, generator=generator).tolist()
        area = image.width * image.height * (smallest + (1 - smallest) * share)
        ratio = math.exp(low + (high - low) * shape)
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = int(torch.randint(image.width - width + 1, (), generator=generator))
            top = int(torch.randint(image.height - height + 1, (), generator=generator))
            break
    else:
        width = min(image.width, round(image.height * 4 / 3))
        height = min(image.height, round(image.width * 4 / 3))
        left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height)).resize(
        (size, size), Image.Resampling.BICUBIC
    )


def rand_augment(
    image: Image.Image, kind: RandAugment, magnitude: int, generator: torch.Generator
) -> Image.Image:
    """Returns an RGB image after two drawn changes, of a strength of 10 for `geometry` and of 30 for `colour`."""
    if kind == "none":
        return image
    policy = POLICIES[kind]
    names = list(policy.ops)
    for choice in torch.randint(len(names), (2,), generator=generator).tolist():
        made, sign = torch.rand(2, generator=generator).tolist()
        if made < policy.probability:
            name = names[choice]
            low, high = policy.ops[name]
            value = low + (high - low) * magnitude / policy.highest
            image = change(image, name, -value if name in _SIGNED and sign < 0.5 else value, policy)
    return image


def change(image: Image.Image, name: str, value: float, policy: Policy) -> Image.Image:
    """Returns an RGB image after one change by degrees, pixels, a factor, bits or a grey level."""
    match name:
        case "identity":
            return image
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "posterize":
            return ImageOps.posterize(image, max(int(value), 1))
        case "solarize":
            return ImageOps.solarize(image, math.ceil(value))
        case "solarize_add":
            return ImageOps.solarize(
                image.point([min(level + int(value), 255) for level in range(256)] * 3), 128
            )
        case "colour" | "contrast" | "brightness" | "sharpness":
            return getattr(ImageEnhance, name.replace("colour", "color").title())(image).enhance(
                value
            )
        case "rotate":
            cos, sin = math.cos(math.radians(value)), math.sin(math.radians(value))
            x, y = image.width / 2, image.height / 2
            return _moved(
                image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y), policy
            )
        case "shear_x":
            return _moved(image, (1, value, 0, 0, 1, 0), policy)
        case "shear_y":
            return _moved(image, (1, 0, 0, value, 1, 0), policy)
        case "translate_x":
            return _moved(image, (1, 0, -value, 0, 1, 0), policy)
        case "translate_y":
            return _moved(image, (1, 0, 0, 0, 1, -value), policy)
    raise ValueError(f"there is no change {name!r} of an image")


def _moved(
    image: Image.Image, matrix: tuple[float, float, float, float, float, float], policy: Policy
) -> Image.Image:
    """Takes each pixel from where `matrix` maps it to: of Pillow's corners, or with `bilinear` of OpenCV's centres."""
    fill, size, resample = (policy.fill,) * 3, image.size, Image.Resampling.NEAREST
    if policy.bilinear:
        a, b, c, d, e, f = matrix
        matrix = (a, b, c + 1 + (1 - a - b) / 2, d, e, f + 1 + (1 - d - e) / 2)
        image, resample = ImageOps.expand(image, 1, fill), Image.Resampling.BILINEAR
    return image.transform(size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)


def augment(
    pixels: UInt8[Tensor, "b 3 h w"], kind: Augmentation, generator: torch.Generator
) -> UInt8[Tensor, "b 3 h w"]:
    """Returns randomly turned, scaled, moved and lit images; `none` returns them as they are.

    By mild values that were not tuned; that views help was seen on the validation flags. Nothing is mirrored: captions
    name left and right.
    """
    if kind == "none":
        return pixels
    matrices = _matrices(len(pixels), generator)
    grid = F.affine_grid(matrices, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(
        pixels.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    light = _uniform(len(pixels), (0.85, 1.15), generator)[:, None, None, None]
    return (moved * light).round().clamp(0, 255).to(torch.uint8)


def drop_words(text: str, share: float, generator: torch.Generator) -> str:
    """Returns `text` without about `share` of its words; at least one stays.

    A model memorises few captions per image; with words missing, every word has to count.
    """
    if share == 0:
        return text
    words = text.split()
    draws = torch.rand(len(words), generator=generator)
    kept = (draws >= share) | (draws == draws.max())
    return " ".join(word for word, keep in zip(words, kept.tolist(), strict=True) if keep)


def _matrices(count: int, generator: torch.Generator) -> Float[Tensor, "b 2 3"]:
    """Maps output positions to input positions, both in [-1, 1]."""
    angle = _uniform(count, (-math.radians(10), math.radians(10)), generator)
    zoom = 1 / _uniform(count, (0.8, 1.15), generator)  # above 1 crops
    shift = torch.stack(
        [_uniform(count, (-0.2, 0.2), generator) for _ in range(2)], dim=1
    )  # of a side, which is 2 long
    rows = [zoom * angle.cos(), -zoom * angle.sin(), zoom * angle.sin(), zoom * angle.cos()]
    return torch.cat([torch.stack(rows, dim=1).unflatten(1, (2, 2)), shift[:, :, None]], dim=2)


def _uniform(
    count: int, bounds: tuple[float, float], generator: torch.Generator
) -> Float[Tensor, " b"]:
    low, high = bounds
    return low + (high - low) * torch.rand(count, generator=generator)
