"""Random views of training pictures and captions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from bridgetower.data.config import Augmentation

# Mild values that were not tuned; that views help was seen on the validation flags. Nothing is mirrored: captions name
# left and right.
MAX_ROTATION = math.radians(10)
SCALES = (0.8, 1.15)  # of the picture's size; above 1 crops
MAX_SHIFT = 0.1  # of the side
BRIGHTNESS = (0.85, 1.15)


def augment(
    pixels: UInt8[Tensor, "b 3 h w"], kind: Augmentation, generator: torch.Generator
) -> UInt8[Tensor, "b 3 h w"]:
    """Returns randomly turned, scaled, moved and lit pictures; `none` returns them as they are.

    Args:
        pixels: Resized pictures.
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

    Few captions per picture are soon known by heart; with words missing, every word has to stand for something.
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
