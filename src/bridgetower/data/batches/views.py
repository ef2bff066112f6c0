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
    """Random changes of an image."""

    # values of each change at magnitude 0 and at the highest
    ops: Mapping[str, tuple[float, float]]
    highest: int  # magnitude
    probability: float  # that a drawn change is made
    fill: int  # grey level outside the image
    bilinear: bool  # interpolate moved pixels as OpenCV, else take the nearest as Pillow


_NO_RANGE = (0.0, 0.0)  # of changes without a value
_FACTORS = (0.1, 1.9)
_GEOMETRY = {"rotate": (0.0, 30.0), "shear_x": (0.0, 0.3), "shear_y": (0.0, 0.3)}

POLICIES: Mapping[RandAugment, Policy] = {
    # Official `blip_randaug` and `blip_randaug_wohf`, after BLIP's transform/randaugment.py.
    "geometry": Policy(
        {
            "identity": _NO_RANGE,
            "autocontrast": _NO_RANGE,
            "equalize": _NO_RANGE,
            "brightness": _FACTORS,
            "sharpness": _FACTORS,
            **_GEOMETRY,
            "translate_x": (0.0, 10.0),
            "translate_y": (0.0, 10.0),
        },
        highest=10,
        probability=0.5,
        fill=128,
        bilinear=True,
    ),
    # Official `blip_randaug_wc` and `clip_randaug`, after ViLT's transforms/randaug.py.
    "colour": Policy(
        {
            "autocontrast": _NO_RANGE,
            "equalize": _NO_RANGE,
            "posterize": (0.0, 4.0),
            "solarize": (0.0, 256.0),
            "solarize_add": (0.0, 110.0),
            "colour": _FACTORS,
            "contrast": _FACTORS,
            "brightness": _FACTORS,
            "sharpness": _FACTORS,
            **_GEOMETRY,
            "translate_x": (0.0, 100.0),
            "translate_y": (0.0, 100.0),
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

    With `random_crop` a random region is resized to the square, mirrored and changed. Without it the image is changed
    first and resized as in evaluation. Both are as in the official src/transforms/transform.py.
    """
    image = open_image(content, background=processor.config.background)
    if config.random_crop is not None:
        image = _random_crop(image, processor.config.image_size, config.random_crop, generator)
    if config.flip and torch.rand((), generator=generator) < 0.5:
        image = ImageOps.mirror(image)
    image = rand_augment(image, config.rand_augment, config.rand_magnitude, generator)
    if config.random_crop is None:
        return processor.resize(image)
    return to_tensor(image).contiguous()


@cache
def custom_transform(name: str) -> Callable[[Tensor], Any]:
    transform: Callable[[Tensor], Any] = load_object("data.transform", name, Callable)
    return transform


def transformed(
    pixels: UInt8[Tensor, "b 3 h w"], name: str, generator: torch.Generator
) -> UInt8[Tensor, "b 3 h w"]:
    """Returns images after a custom function, each with its own draws from PyTorch's generator."""
    transform = custom_transform(name)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        images = [transform(image) for image in pixels]
    expected = f"{torch.uint8} {list(pixels.shape[1:])}"
    for image in images:
        result = type(image).__name__
        if isinstance(image, Tensor):
            result = f"{image.dtype} {list(image.shape)}"
        if result != expected:
            raise ValueError(
                f"{name} returned {result}; expected a tensor of uint8 {list(pixels.shape[1:])}"
            )
    return torch.stack(images)


def _random_crop(
    image: Image.Image, size: int, min_area: float, generator: torch.Generator
) -> Image.Image:
    """Resizes a random region, as torchvision's `RandomResizedCrop` with sides from 3:4 to 4:3."""
    low = math.log(3 / 4)
    high = math.log(4 / 3)
    for _ in range(10):
        area_draw, ratio_draw = torch.rand(2, generator=generator).tolist()
        area = image.width * image.height * (min_area + (1 - min_area) * area_draw)
        ratio = math.exp(low + (high - low) * ratio_draw)
        width = round(math.sqrt(area * ratio))
        height = round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            x = int(torch.randint(image.width - width + 1, (), generator=generator))
            y = int(torch.randint(image.height - height + 1, (), generator=generator))
            break
    else:
        width = min(image.width, round(image.height * 4 / 3))
        height = min(image.height, round(image.width * 4 / 3))
        x = (image.width - width) // 2
        y = (image.height - height) // 2
    region = image.crop((x, y, x + width, y + height))
    return region.resize((size, size), Image.Resampling.BICUBIC)


def rand_augment(
    image: Image.Image, kind: RandAugment, magnitude: int, generator: torch.Generator
) -> Image.Image:
    """Returns an RGB image after two random changes."""
    if kind == "none":
        return image
    policy = POLICIES[kind]
    names = list(policy.ops)
    for index in torch.randint(len(names), (2,), generator=generator).tolist():
        change_draw, sign_draw = torch.rand(2, generator=generator).tolist()
        if change_draw < policy.probability:
            name = names[index]
            low, high = policy.ops[name]
            value = low + (high - low) * magnitude / policy.highest
            is_negative = name in _SIGNED and sign_draw < 0.5
            image = change(image, name, -value if is_negative else value, policy)
    return image


def change(image: Image.Image, name: str, value: float, policy: Policy) -> Image.Image:
    """Returns an RGB image after a change by degrees, pixels, a factor, bits or a grey level."""
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
            lighter = [min(level + int(value), 255) for level in range(256)]
            return ImageOps.solarize(image.point(lighter * 3), 128)
        case "colour" | "contrast" | "brightness" | "sharpness":
            enhancement = getattr(ImageEnhance, name.replace("colour", "color").title())
            return enhancement(image).enhance(value)
        case "rotate":
            # Around the centre.
            x = image.width / 2
            y = image.height / 2
            cos = math.cos(math.radians(value))
            sin = math.sin(math.radians(value))
            x_shift = x - cos * x + sin * y
            y_shift = y - sin * x - cos * y
            return _moved(image, (cos, -sin, x_shift, sin, cos, y_shift), policy)
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
    """Takes each pixel from the position that a matrix maps it to."""
    fill = (policy.fill,) * 3
    size = image.size
    resample = Image.Resampling.NEAREST
    if policy.bilinear:
        # Pillow counts positions from the corners of pixels, OpenCV from their centres.
        a, b, c, d, e, f = matrix
        matrix = (a, b, c + 1 + (1 - a - b) / 2, d, e, f + 1 + (1 - d - e) / 2)
        image = ImageOps.expand(image, 1, fill)
        resample = Image.Resampling.BILINEAR
    return image.transform(size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)


def augment(
    pixels: UInt8[Tensor, "b 3 h w"], kind: Augmentation, generator: torch.Generator
) -> UInt8[Tensor, "b 3 h w"]:
    """Returns randomly rotated, scaled, moved and lit images, or with `none` the images themselves.

    The ranges are mild and were not tuned. Nothing is mirrored, because captions name left and right.
    """
    if kind == "none":
        return pixels
    matrices = _random_matrices(len(pixels), generator)
    grid = F.affine_grid(matrices, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(
        pixels.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    light = _uniform(len(pixels), (0.85, 1.15), generator)[:, None, None, None]
    return (moved * light).round().clamp(0, 255).to(torch.uint8)


def drop_words(text: str, share: float, generator: torch.Generator) -> str:
    """Returns a text without about a share of its words, at least one of which stays.

    A model memorises few captions per image. With words missing, every word has to count.
    """
    if share == 0:
        return text
    words = text.split()
    draws = torch.rand(len(words), generator=generator)
    stays = (draws >= share) | (draws == draws.max())
    return " ".join(words[index] for index in stays.nonzero()[:, 0].tolist())


def _random_matrices(count: int, generator: torch.Generator) -> Float[Tensor, "b 2 3"]:
    """Maps output positions to input positions, both in [-1, 1]."""
    angle = _uniform(count, (-math.radians(10), math.radians(10)), generator)
    zoom = 1 / _uniform(count, (0.8, 1.15), generator)  # above 1 crops
    shift_x = _uniform(count, (-0.2, 0.2), generator)  # of a side, which is 2 long
    shift_y = _uniform(count, (-0.2, 0.2), generator)
    cos = zoom * angle.cos()
    sin = zoom * angle.sin()
    values = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1)
    return values.unflatten(1, (2, 3))


def _uniform(
    count: int, bounds: tuple[float, float], generator: torch.Generator
) -> Float[Tensor, " b"]:
    low, high = bounds
    return low + (high - low) * torch.rand(count, generator=generator)
