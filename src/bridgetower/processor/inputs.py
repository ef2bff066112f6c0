"""Images and texts as callers give them, one or several, as lists of which none is empty."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from bridgetower.processor.images import ImageLike, Resized

Images = ImageLike | Sequence[ImageLike]
Texts = str | Sequence[str]

_Item = TypeVar("_Item")


def is_image(given: object) -> bool:
    """Whether something is one image, not several."""
    return isinstance(given, str | os.PathLike | bytes | Image.Image | np.ndarray | Tensor | Resized)


def image_list(images: Images) -> list[ImageLike]:
    """Returns one image or several as a list.

    Raises:
        ValueError: There are none.
    """
    return _some([images] if is_image(images) else list(images), "images")  # type: ignore[arg-type, list-item]


def text_list(texts: Texts) -> list[str]:
    """Returns one text or several as a list.

    Raises:
        ValueError: There are none.
    """
    return _some([texts] if isinstance(texts, str) else list(texts), "texts")


def pair_lists(images: Images, texts: Texts, advice: str = "") -> tuple[list[ImageLike], list[str]]:
    """Returns as many images as texts.

    Args:
        images, texts: Image n goes with text n.
        advice: What else to do, for the error.

    Raises:
        ValueError: There are none, or their numbers differ.
    """
    some_images, some_texts = image_list(images), text_list(texts)
    if len(some_images) != len(some_texts):
        raise ValueError(f"{len(some_images)} images and {len(some_texts)} texts; expected one text per image{advice}")
    return some_images, some_texts


def either_lists(
    images: ImageLike | Sequence[ImageLike | None] | None, texts: Texts | None, blank: ImageLike
) -> tuple[list[ImageLike], list[str]]:
    """Returns as many images as texts, of which one or the other may be missing.

    Args:
        images: None in the place of an image is `blank`. None: all are.
        texts: None: all are empty.
        blank: Stands where an image is missing.

    Raises:
        ValueError: Both are None, there are none, or their numbers differ.
    """
    if images is None and texts is None:
        raise ValueError("neither images nor texts given; expected one of them at least")
    words = [] if texts is None else text_list(texts)
    several: Any = [None] * len(words) if images is None else [images] if is_image(images) else images
    shown = image_list([blank if image is None else image for image in several])
    return pair_lists(shown, words or [""] * len(shown))


def _some(items: list[_Item], what: str) -> list[_Item]:
    if not items:
        raise ValueError(f"no {what} given; expected at least one")
    return items
