"""Random views of training images and captions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomResizedCrop, functional

from bridgetower.data.config import Augmentation, DataConfig
from bridgetower.data.rand_augment import rand_augment
from bridgetower.processor import Processor, open_image

# Mild values that were not tuned; that views help was seen on the validation flags. Nothing is mirrored: captions name
# left and right.
MAX_ROTATION = math.radians(10)
SCALES = (0.8, 1.15)  # of the image's size; above 1 crops
MAX_SHIFT = 0.1  # of the side
BRIGHTNESS = (0.85, 1.15)


def random_view(
    content: bytes, config: DataConfig, processor: Processor, generator: torch.Generator
) -> UInt8[Tensor, "3 h w"]:
    """Returns an image at the model's size after the random changes that the config asks for.

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

    Few captions per image are soon known by heart; with words missing, every word has to stand for something.
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
