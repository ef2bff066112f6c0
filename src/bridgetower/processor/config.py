"""Settings of preprocessing, which are saved with the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bridgetower.model.config import check_image_size
from bridgetower.plain import check_choice, check_numbers

Profile = Literal["official-pretrain", "official-finetune", "hf"]
Interpolation = Literal["bicubic", "bilinear"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# `fast_decode` keeps an image at least this many times larger than needed, see benchmarks/decoding.py.
FAST_MARGIN = 2


@dataclass(frozen=True, kw_only=True)
class ProcessorConfig:
    """How an image and a text are prepared for the model.

    Attributes:
        profile: `official-pretrain` scales the short side and crops the centre (the official `clip` transform);
            `official-finetune` squashes to a square (the official `blip` transform in evaluation); `hf` does what
            transformers' BridgeTowerImageProcessor does, black borders included.
        image_size: Side of the square that the model receives, in pixels.
        max_length: Longest text in tokens, start and end token included.
        image_mean, image_std: Per channel, for values from 0 to 1.
        interpolation: Of the resizing.
        patch_size: Patch side of the model; if given, it must divide `image_size`.
        background: Colour (0-255) behind transparent pixels. None ignores transparency, as the official code does: a
            transparent pixel has the colour that the file stores for it, which is black in many icons and emoji.
        shortest_edge: `hf` only: short side before the crop, in pixels; None takes `image_size`.
        size_divisor: `hf` only: both sides are cut down to a multiple of it before the crop; None takes 32.
        fast_decode: Decode JPEG files at 1/2, 1/4 or 1/8 of their size where that leaves sides of `FAST_MARGIN` times
            the pixels that are needed. Much faster for large images; pixels differ a little from any other code's.
    """

    profile: Profile
    image_size: int
    max_length: int
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    interpolation: Interpolation = "bicubic"
    patch_size: int | None = None
    background: tuple[int, int, int] | None = None
    shortest_edge: int | None = None
    size_divisor: int | None = None
    fast_decode: bool = False

    def __post_init__(self) -> None:
        # Sizes.
        check_choice("profile", self.profile, Profile)
        check_choice("interpolation", self.interpolation, Interpolation)
        sizes = ("image_size", "patch_size", "shortest_edge", "size_divisor")
        bounds: dict[str, tuple[float, float]] = dict.fromkeys(sizes, (1, 8_192))
        # The shortest text has a start, an end and one token.
        bounds["max_length"] = (3, 10_000_000)
        check_numbers(self, "", **bounds)
        if self.patch_size is not None:
            check_image_size(self.image_size, self.patch_size)

        # Colours.
        has_mean = _are_three_within(self.image_mean, -1e3, 1e3)
        has_std = _are_three_within(self.image_std, 1e-3, 1e3)
        if not (has_mean and has_std):
            raise ValueError(
                f"image_mean {self.image_mean} and image_std {self.image_std}; expected three values each, "
                "of image_mean from -1,000 to 1,000, of image_std from 0.001 to 1,000"
            )
        background = self.background
        if background is not None:
            are_integers = all(type(level) is int for level in background)
            if not are_integers or not _are_three_within(background, 0, 255):
                raise ValueError(
                    f"background is {background}; expected three whole numbers from 0 to 255, or None"
                )

        # Only `hf` resizes to another side than `image_size`.
        if self.profile == "hf":
            if self.resize_edge < self.resize_divisor:
                raise ValueError(
                    f"short side {self.resize_edge} px is below size_divisor {self.resize_divisor}, so every image "
                    "would vanish; raise image_size or lower size_divisor"
                )
            return
        for name in ("shortest_edge", "size_divisor"):
            size = getattr(self, name)
            if size is not None:
                raise ValueError(f"{name} is {size}, which profile {self.profile!r} does not use")

    @property
    def resize_edge(self) -> int:
        """Short side before the crop, in pixels."""
        return self.image_size if self.shortest_edge is None else self.shortest_edge

    @property
    def resize_divisor(self) -> int:
        """Both sides are cut down to a multiple of this, in pixels, in the `hf` profile."""
        return 32 if self.size_divisor is None else self.size_divisor


def _are_three_within(values: Sequence[float], low: float, high: float) -> bool:
    return len(values) == 3 and all(low <= value <= high for value in values)
