"""The images of prepared sets, decoded by batch, with the examples about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from bridgetower.data.batch import CachedFeatures
from bridgetower.data.config import DataConfig
from bridgetower.data.frozen import FrozenImages
from bridgetower.data.prepared_set import PreparedSet
from bridgetower.data.schema import CAPTIONS, Schema
from bridgetower.data.views import augment, own_transform, random_view, transformed
from bridgetower.processor import Processor

NO_IMAGE = -1
"""Number of the image of an example that has only a text."""


class PreparedImages:
    """The images and examples of splits of several prepared sets, each numbered through all sets.

    Attributes:
        sets: With the splits that are read of them.
        image_of: Number of the first image of each example, `NO_IMAGE` where it has none.
        frozen: Cached features of a frozen image tower, which `views` and `pixel_values` then return; None: pixels.
        raw: Whether `views` leaves normalising to who has the pixels on a GPU.
    """

    def __init__(
        self, config: DataConfig, splits: str | Sequence[str], processor: Processor, *, schema: Schema = CAPTIONS
    ) -> None:
        """Opens the sets.

        Raises:
            FileNotFoundError: A set or its split is missing.
            ValueError: No set is given, or one is of another kind.
        """
        if not config.folders:
            raise ValueError("no data folder given; pass --data.folders DIR, made by `bridgetower prepare`")
        self.config, self.processor, self.schema = config, processor, schema
        self.splits = (splits,) if isinstance(splits, str) else tuple(splits)
        self.sets = [PreparedSet(folder, self.splits, schema) for folder in config.folders]
        self.sets += [PreparedSet(folder, ("train",), schema) for folder in config.train_only]
        self._ends = list(accumulate(len(one.numbers) for one in self.sets))
        self._image_ends = list(accumulate(one.num_images for one in self.sets))
        starts = [0, *self._image_ends]
        groups = [
            np.where(one.groups < 0, NO_IMAGE, one.groups + start)
            for one, start in zip(self.sets, starts, strict=False)
        ]
        self.image_of = torch.from_numpy(np.concatenate(groups)).long()
        if config.transform is not None:
            own_transform(config.transform)  # a wrong name is an error here, not in the first batch of a worker
        self.frozen: FrozenImages | None = None
        self.raw = False
        self._cache: dict[int, Tensor] = {}
        self._examples: list[dict[str, Any]] = []

    def __len__(self) -> int:
        """Number of images."""
        return self._image_ends[-1]

    @property
    def num_examples(self) -> int:
        """Examples of all sets."""
        return self._ends[-1]

    def digests(self) -> dict[str, str]:
        """Returns the digest of every set with its splits, which is another where a set was prepared anew."""
        return {f"{one.folder} ({', '.join(one.splits)})": one.info.digest for one in self.sets}

    def sets_of(self, examples: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Returns the number of the set of each example."""
        return torch.searchsorted(torch.tensor(self._ends), examples, right=True)

    def repeated(self, examples: Int[Tensor, " n"]) -> Int[Tensor, " m"]:
        """Returns the examples of an epoch: those of a set as often as the config says."""
        if not self.config.repeats:
            return examples
        times = torch.tensor(self.config.repeats)[self.sets_of(examples)]
        return torch.cat([examples[times > number] for number in range(int(times.max()))])

    def examples(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Returns examples, each with its `id`, the numbers of its `images` and its `entry`."""
        if self.config.cache:
            self._examples = self._examples or list(self.scan())
            return [self._examples[number] for number in numbers]
        found: dict[int, dict[str, Any]] = {}
        for one, start, end, first in zip(
            self.sets, [0, *self._ends], self._ends, [0, *self._image_ends], strict=False
        ):
            own = sorted({number for number in numbers if start <= number < end})
            if own:
                rows = one.examples([number - start for number in own])
                found |= {number: _renumbered(row, first) for number, row in zip(own, rows, strict=True)}
        return [found[number] for number in numbers]

    def scan(self) -> Iterator[dict[str, Any]]:
        """Yields all examples in order, some in memory at a time."""
        for one, first in zip(self.sets, [0, *self._image_ends], strict=False):
            yield from (_renumbered(row, first) for row in one.scan())

    def contents(self, images: Sequence[int]) -> list[bytes]:
        """Returns the files of images as they were prepared."""
        images = self._in_sets(images)
        found: dict[int, bytes] = {}
        for one, start, end in zip(self.sets, [0, *self._image_ends], self._image_ends, strict=False):
            own = sorted({image for image in images if start <= image < end})
            if own:
                found |= dict(zip(own, one.images([image - start for image in own]), strict=True))
        return [found[image] for image in images]

    def pixels(self, images: Sequence[int]) -> list[UInt8[Tensor, "3 h w"]]:
        """Returns resized images.

        Raises:
            ValueError: One cannot be decoded; its name is in the error.
        """
        wanted = [image for image in images if image >= 0 and image not in self._cache]
        decoded = {
            image: self._resized(image, content) for image, content in zip(wanted, self.contents(wanted), strict=True)
        }
        if self.config.cache:
            self._cache |= decoded
        known = self._cache | decoded if decoded else self._cache
        return [self.processor.resize(self.processor.blank_image()) if image < 0 else known[image] for image in images]

    def views(
        self, images: Sequence[int], generator: torch.Generator
    ) -> Float[Tensor, "b 3 h w"] | UInt8[Tensor, "b 3 h w"] | CachedFeatures:
        """Returns images, augmented as configured and normalised, unless `raw` leaves that to who has them on a GPU.

        Raises:
            ValueError: One cannot be decoded; its name is in the error.
        """
        if self.frozen is not None:
            return self.frozen.views(images, generator)
        if self.config.has_views:
            there = [image for image in images if image >= 0]
            contents = dict(zip(there, self.contents(there), strict=True))
            views = [self._view(image, contents.get(image), generator) for image in images]
        else:
            views = self.pixels(images)
        pixels = augment(torch.stack(views), self.config.augmentation, generator)
        if self.config.transform is not None:
            pixels = transformed(pixels, self.config.transform, generator)
        return pixels if self.raw else self.processor.normalise(pixels)

    def pixel_values(self, images: Sequence[int]) -> Float[Tensor, "b 3 h w"] | CachedFeatures:
        """Returns normalised images."""
        if self.frozen is not None:
            return self.frozen.first_views(images)
        return self.processor.normalise(torch.stack(self.pixels(images)))

    def _resized(self, image: int, content: bytes) -> UInt8[Tensor, "3 h w"]:
        try:
            return self.processor.resize(content)
        except ValueError as error:
            raise ValueError(f"{self._named(image)}: {error}") from error

    def _view(self, image: int, content: bytes | None, generator: torch.Generator) -> UInt8[Tensor, "3 h w"]:
        if content is None:
            return self.pixels([NO_IMAGE])[0]
        try:
            return random_view(content, self.config, self.processor, generator)
        except ValueError as error:
            raise ValueError(f"{self._named(image)}: {error}") from error

    def _in_sets(self, images: Sequence[int]) -> Sequence[int]:
        """Numbers of images among those of all sets."""
        return images

    def _named(self, image: int) -> str:
        (image,) = self._in_sets([image])
        number = int(np.searchsorted(self._image_ends, image, side="right"))
        one, start = self.sets[number], [0, *self._image_ends][number]
        return f"image {one.image_names([image - start])[0]} of {one.folder}"


def _renumbered(row: dict[str, Any], first: int) -> dict[str, Any]:
    return {**row, "images": [first + image for image in row["images"]]}
