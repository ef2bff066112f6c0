"""Images and texts as callers give them, one or several, as lists of which none is empty."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any, TypeAlias, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Resized:
    """An image from `Processor.prepare`, opened in another process for example; accepted wherever an image is.

    Attributes:
        pixels: At the model's size.
        width: Of the upright image that it was, in pixels.
        height: Of the same.
    """

    pixels: UInt8[Tensor, "3 h w"] = field(repr=False)
    width: int
    height: int


ImageLike: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | np.ndarray | Tensor | Resized
)
"""A path, an image file as bytes or opened (`BytesIO`), a PIL image, a uint8 array or tensor [H, W], [H, W, 1|3|4] or
[1|3|4, H, W], or an image that is at the model's size already."""

Images = ImageLike | Sequence[ImageLike]
Texts = str | Sequence[str]

_Item = TypeVar("_Item")


def is_image(given: object) -> bool:
    """Whether something is one image, not several; an array or a tensor of four axes is a batch of them."""
    if isinstance(given, np.ndarray | Tensor):
        return given.ndim != 4
    in_memory = isinstance(given, bytes | bytearray | memoryview | Image.Image | Resized)
    return in_memory or isinstance(given, str | os.PathLike) or hasattr(given, "read")


def image_list(images: Images) -> list[ImageLike]:
    """Returns one image or several as a list."""
    return _some([images] if is_image(images) else list(images), "images")  # type: ignore[arg-type, list-item]


def text_list(texts: Texts) -> list[str]:
    """Returns one text or several as a list."""
    return _some([texts] if isinstance(texts, str) else list(texts), "texts")


def pair_lists(
    images: Images, texts: Texts, advice: str = "", *, images_2: Images | None = None
) -> tuple[list[ImageLike], list[str], list[ImageLike] | None]:
    """Returns as many images as texts; a single one goes with all of the others."""
    lists: dict[str, list[Any]] = {"images": image_list(images)}
    lists |= {} if images_2 is None else {"second images": image_list(images_2)}
    lists["texts"] = text_list(texts)
    count = max(map(len, lists.values()))
    if any(len(given) not in (1, count) for given in lists.values()):
        *others, last = (f"{len(given)} {name}" for name, given in lists.items())
        raise ValueError(f"{', '.join(others)} and {last}; expected one text per image, or one of either{advice}")
    aligned = {name: given * count if len(given) == 1 else given for name, given in lists.items()}
    return aligned["images"], aligned["texts"], aligned.get("second images")


def either_lists(
    images: ImageLike | Sequence[ImageLike | None] | None, texts: Texts | None, blank: ImageLike
) -> tuple[list[ImageLike], list[str]]:
    """Returns as many images as texts, of which one or the other may be missing."""
    if images is None and texts is None:
        raise ValueError("neither images nor texts given; expected one of them at least")
    words = [] if texts is None else text_list(texts)
    several: Any = [None] * len(words) if images is None else [images] if is_image(images) else images
    shown = image_list([blank if image is None else image for image in several])
    return pair_lists(shown, words or [""])[:2]


def _some(items: list[_Item], what: str) -> list[_Item]:
    if not items:
        raise ValueError(f"no {what} given; expected at least one")
    return items
