"""Random views of training images and captions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomResizedCrop, functional

from bridgetower.data.config import Augmentation, DataConfig, RandAugment
from bridgetower.processor import Processor, open_image

# Mild values that were not tuned; that views help was seen on the validation flags. Nothing is mirrored: captions name
# left and right.
MAX_ROTATION = math.radians(10)
SCALES = (0.8, 1.15)  # of the image's size; above 1 crops
MAX_SHIFT = 0.1  # of the side
BRIGHTNESS = (0.85, 1.15)

NUM_OPS = 2
"""Random changes of an image by RandAugment."""

_SIGNED = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


@dataclass(frozen=True)
class Policy:
    """What may happen to an image.

    Attributes:
        ops: Value of each change at magnitude 0 and at the highest.
        highest: Magnitude.
        probability: Of each drawn change to be made.
        fill: Grey level of what comes into the image from outside.
    """

    ops: Mapping[str, tuple[float, float]]
    highest: int
    probability: float
    fill: int


_ENHANCE = (0.1, 1.9)
_GEOMETRY = {"rotate": (0.0, 30.0), "shear_x": (0.0, 0.3), "shear_y": (0.0, 0.3)}
_NOTHING = (0.0, 0.0)

POLICIES: Mapping[RandAugment, Policy] = {
    # Official `blip_randaug` and `blip_randaug_wohf`, after BLIP's transform/randaugment.py.
    "geometry": Policy(
        {
            "identity": _NOTHING,
            "autocontrast": _NOTHING,
            "equalize": _NOTHING,
            "brightness": _ENHANCE,
            "sharpness": _ENHANCE,
            **_GEOMETRY,
            "translate_x": (0.0, 10.0),
            "translate_y": (0.0, 10.0),
        },
        highest=10,
        probability=0.5,
        fill=128,
    ),
    # Official `blip_randaug_wc` and `clip_randaug`, after ViLT's transforms/randaug.py.
    "colour": Policy(
        {
            "autocontrast": _NOTHING,
            "equalize": _NOTHING,
            "posterize": (0.0, 4.0),
            "solarize": (0.0, 256.0),
            "solarize_add": (0.0, 110.0),
            "colour": _ENHANCE,
            "contrast": _ENHANCE,
            "brightness": _ENHANCE,
            "sharpness": _ENHANCE,
            **_GEOMETRY,
            "translate_x": (0.0, 100.0),
            "translate_y": (0.0, 100.0),
        },
        highest=30,
        probability=1.0,
        fill=0,
    ),
}


def random_view(
    content: bytes, config: DataConfig, processor: Processor, generator: torch.Generator
) -> UInt8[Tensor, "3 h w"]:
    """Returns an image at the model's size after the random changes of the config.

    With `random_crop` a part of the image is resized to the square, mirrored and changed; without it the image is
    changed first and resized as in evaluation. Both as in official src/transforms/transform.py.

    Raises:
        ValueError: The image cannot be decoded.
    """
    image = open_image(content, background=processor.config.background)
    size = processor.config.image_size
    if config.random_crop is not None:
        image = _crop(image, size, config.random_crop, generator)
    if config.flip and torch.rand((), generator=generator) < 0.5:
        image = functional.horizontal_flip(image)
    image = rand_augment(image, config.rand_augment, config.rand_magnitude, generator)
    if config.random_crop is None:
        return processor.resize(image)
    pixels: Tensor = functional.pil_to_tensor(image)
    return pixels


def _crop(image: Image.Image, size: int, smallest: float, generator: torch.Generator) -> Image.Image:
    crop = RandomResizedCrop(size, scale=(smallest, 1.0), interpolation=InterpolationMode.BICUBIC)
    with _drawing_from(generator):
        cropped: Image.Image = crop(image)
    return cropped


@contextmanager
def _drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Lets torchvision, which draws from torch's global generator, draw from another one."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def rand_augment(image: Image.Image, kind: RandAugment, magnitude: int, generator: torch.Generator) -> Image.Image:
    """Returns an image after two drawn changes; `none` returns it as it is.

    Args:
        image: RGB.
        kind: Which changes there are.
        magnitude: Their strength, of 10 for `geometry` and of 30 for `colour`.
        generator: Source of all draws.
    """
    if kind == "none":
        return image
    policy = POLICIES[kind]
    names = list(policy.ops)
    for choice in torch.randint(len(names), (NUM_OPS,), generator=generator).tolist():
        made, sign = torch.rand(2, generator=generator).tolist()
        if made < policy.probability:
            name = names[choice]
            low, high = policy.ops[name]
            value = low + (high - low) * magnitude / policy.highest
            image = change(image, name, -value if name in _SIGNED and sign < 0.5 else value, policy.fill)
    return image


def change(image: Image.Image, name: str, value: float, fill: int) -> Image.Image:
    """Returns an image after one change.

    Args:
        image: RGB.
        name: One of the names in `POLICIES`.
        value: Degrees, pixels, a shear factor, an enhancement factor (1 changes nothing), bits or a grey level.
        fill: Grey level of what comes in from outside.
    """
    match name:
        case "identity":
            return image
        case "autocontrast":
            return functional.autocontrast(image)
        case "equalize":
            return functional.equalize(image)
        case "posterize":
            return functional.posterize(image, max(int(value), 1))
        case "solarize":
            return functional.solarize(image, value)
        case "solarize_add":
            return functional.solarize(image.point([min(level + int(value), 255) for level in range(256)] * 3), 128)
        case "colour":
            return functional.adjust_saturation(image, value)
        case "contrast":
            return functional.adjust_contrast(image, value)
        case "brightness":
            return functional.adjust_brightness(image, value)
        case "sharpness":
            return functional.adjust_sharpness(image, value)
        case "rotate":
            return functional.rotate(image, value, fill=[fill])
        case "shear_x" | "shear_y":
            degrees = math.degrees(math.atan(value))
            shear = [degrees, 0.0] if name == "shear_x" else [0.0, degrees]
            return _moved(image, fill, shear=shear)
        case "translate_x" | "translate_y":
            pixels = round(value)
            return _moved(image, fill, translate=[pixels, 0] if name == "translate_x" else [0, pixels])
    raise ValueError(f"there is no change {name!r} of an image")


def _moved(
    image: Image.Image, fill: int, *, shear: list[float] | None = None, translate: list[int] | None = None
) -> Image.Image:
    moved: Image.Image = functional.affine(
        image,
        angle=0.0,
        translate=translate or [0, 0],
        scale=1.0,
        shear=shear or [0.0, 0.0],
        fill=[fill],
        center=[0.0, 0.0],
    )
    return moved


def augment(
    pixels: UInt8[Tensor, "b 3 h w"], kind: Augmentation, generator: torch.Generator
) -> UInt8[Tensor, "b 3 h w"]:
    """Returns randomly turned, scaled, moved and lit images; `none` returns them as they are.

    Args:
        pixels: Resized images.
        kind: What to do.
        generator: Source of all draws.
    """
    if kind == "none":
        return pixels
    matrices = _matrices(len(pixels), generator)
    grid = F.affine_grid(matrices, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    light = _uniform(len(pixels), BRIGHTNESS, generator)[:, None, None, None]
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
    angle = _uniform(count, (-MAX_ROTATION, MAX_ROTATION), generator)
    zoom = 1 / _uniform(count, SCALES, generator)
    shift = torch.stack([_uniform(count, (-2 * MAX_SHIFT, 2 * MAX_SHIFT), generator) for _ in range(2)], dim=1)
    rows = [zoom * angle.cos(), -zoom * angle.sin(), zoom * angle.sin(), zoom * angle.cos()]
    return torch.cat([torch.stack(rows, dim=1).unflatten(1, (2, 2)), shift[:, :, None]], dim=2)


def _uniform(count: int, bounds: tuple[float, float], generator: torch.Generator) -> Float[Tensor, " b"]:
    low, high = bounds
    return low + (high - low) * torch.rand(count, generator=generator)
