"""Random views of training pictures, as the official fine-tuning makes them from the picture files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomResizedCrop, functional

from bridgetower.data.config import DataConfig
from bridgetower.data.rand_augment import rand_augment
from bridgetower.processor import Processor, open_image


def random_view(
    content: bytes, config: DataConfig, processor: Processor, generator: torch.Generator
) -> UInt8[Tensor, "3 h w"]:
    """Returns a picture at the model's size after the random changes that the config asks for.

    With `random_crop` a part of the picture is resized to the square, mirrored and changed; without it the picture is
    changed first and resized as in evaluation. Both as in official src/transforms/transform.py.

    Raises:
        ValueError: The picture cannot be decoded.
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
