"""The images of prepared sets, decoded by batch, with the examples about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from bridgetower.data.batch import Batch
from bridgetower.data.config import DataConfig
from bridgetower.data.prepared_set import PreparedSet
from bridgetower.data.schema import CAPTIONS, Schema
from bridgetower.data.views import augment, own_transform, random_view, transformed
from bridgetower.processor import Processor

AnyBatch = TypeVar("AnyBatch", bound=Batch)

NO_IMAGE = -1
"""Number of the image of an example that has only a text."""


class PreparedImages:
    """The images and examples of splits of several prepared sets, each numbered through all sets.

    Attributes:
        sets: With the splits that are read of them.
        image_of: Number of the first image of each example, `NO_IMAGE` where it has none.
        frozen: Gives what batches have of images in the place of pixels: their hidden states, or their numbers inside a
            `FrozenDataset`; None: pixels.
        raw: Whether `views` leaves normalising to who has the pixels on a GPU.
    """

    def __init__(
        self, config: DataConfig, splits: str | Sequence[str], processor: Processor, *, schema: Schema = CAPTIONS
    ) -> None:
        if not config.folders:
            raise ValueError("no data folder given; pass --data.folders DIR, made by `bridgetower prepare`")
        self.config, self.processor, self.schema = config, processor, schema
        self.splits = (splits,) if isinstance(splits, str) else tuple(splits)
        self.sets = [PreparedSet(folder, self.splits, schema) for folder in config.folders]
        self.sets += [PreparedSet(folder, ("train",), schema) for folder in config.train_only]
        self._starts = [0, *accumulate(len(one.numbers) for one in self.sets)]
        self._image_starts = [0, *accumulate(one.num_images for one in self.sets)]
        groups = [
            np.where(one.groups < 0, NO_IMAGE, one.groups + start)
            for one, start in zip(self.sets, self._image_starts, strict=False)
        ]
        self.image_of = torch.from_numpy(np.concatenate(groups)).long()
        if config.transform is not None:
            own_transform(config.transform)  # a wrong name is an error here, not in the first batch of a worker
        self.frozen: Callable[[Sequence[int]], Tensor] | None = None
        self.raw = False
        self._cache: dict[int, Tensor] = {}
        self._examples: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return self._image_starts[-1]

    @property
    def num_examples(self) -> int:
        return self._starts[-1]

    def digests(self) -> dict[str, str]:
        """Returns the digest of every set with its splits, which is another where a set was prepared anew."""
        return {f"{one.folder} ({', '.join(one.splits)})": one.info.digest for one in self.sets}

    def sets_of(self, examples: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Returns the number of the set of each example."""
        return torch.searchsorted(torch.tensor(self._starts[1:]), examples, right=True)

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
        for one, own in self._shares(numbers, self._starts):
            rows = self.sets[one].examples([number - self._starts[one] for number in own])
            found |= {number: self._renumbered(one, row) for number, row in zip(own, rows, strict=True)}
        return [found[number] for number in numbers]

    def scan(self) -> Iterator[dict[str, Any]]:
        """Yields all examples in order, some in memory at a time."""
        for number, one in enumerate(self.sets):
            yield from (self._renumbered(number, row) for row in one.scan())

    def contents(self, images: Sequence[int]) -> list[bytes]:
        """Returns the files of images as they were prepared."""
        images, found = self._in_sets(images), dict[int, bytes]()
        for one, own in self._shares(images, self._image_starts):
            found |= dict(
                zip(own, self.sets[one].images([image - self._image_starts[one] for image in own]), strict=True)
            )
        return [found[image] for image in images]

    def pixels(self, images: Sequence[int]) -> list[UInt8[Tensor, "3 h w"]]:
        wanted = [image for image in dict.fromkeys(images) if image not in self._cache]
        decoded = dict(zip(wanted, self._decoded(wanted, self.processor.resize), strict=True))
        if self.config.cache:
            self._cache |= decoded
        return [decoded[image] if image in decoded else self._cache[image] for image in images]

    def views(
        self, images: Sequence[int], generator: torch.Generator
    ) -> Float[Tensor, "b 3 h w"] | UInt8[Tensor, "b 3 h w"]:
        """Returns images, augmented as configured and normalised, unless `raw` leaves that to who has them on a GPU."""
        if self.config.has_views:
            views = self._decoded(images, lambda content: random_view(content, self.config, self.processor, generator))
        else:
            views = self.pixels(images)
        pixels = augment(torch.stack(views), self.config.augmentation, generator)
        if self.config.transform is not None:
            pixels = transformed(pixels, self.config.transform, generator)
        return pixels if self.raw else self.processor.normalise(pixels)

    def pixel_values(self, images: Sequence[int]) -> Float[Tensor, "b 3 h w"]:
        return self.processor.normalise(torch.stack(self.pixels(images)))

    def fields(self, images: Sequence[int], generator: torch.Generator, suffix: str = "") -> dict[str, Any]:
        """Returns views of images as a field of a batch; the field of second images ends in `suffix`."""
        if self.frozen is not None:
            return {f"image_states{suffix}": self.frozen(images)}
        return {f"pixel_values{suffix}": self.views(images, generator)}

    def batch(self, images: Sequence[int]) -> Batch:
        """Returns images as they are, which `on_device` normalises."""
        if self.frozen is not None:
            return Batch(image_states=self.frozen(images))
        return Batch(pixel_values=torch.stack(self.pixels(images)))

    def on_device(self, batch: AnyBatch, device: torch.device) -> AnyBatch:
        """Moves a batch to a device, and normalises there the pixels that came as uint8."""
        moved: Any = batch.to(device)
        raw = {
            name: self.processor.normalise(value)
            for name, value in vars(moved).items()
            if isinstance(value, Tensor) and value.dtype == torch.uint8
        }
        return replace(moved, **raw) if raw else moved

    def _decoded(self, images: Sequence[int], decode: Callable[[bytes], Tensor]) -> list[UInt8[Tensor, "3 h w"]]:
        there, found = [image for image in images if image >= 0], []
        contents = dict(zip(there, self.contents(there), strict=True))
        for image in images:
            try:
                found.append(
                    self.processor.resize(self.processor.blank_image()) if image < 0 else decode(contents[image])
                )
            except ValueError as error:
                ((number, (place,)),) = self._shares(self._in_sets([image]), self._image_starts)
                one = self.sets[number]
                (name,) = one.image_names([place - self._image_starts[number]])
                raise ValueError(f"image {name} of {one.folder}: {error}") from error
        return found

    def _in_sets(self, images: Sequence[int]) -> Sequence[int]:
        """Numbers of images among those of all sets."""
        return images

    def _shares(self, numbers: Sequence[int], starts: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Yields the sets that some examples or images are of, with those of each, without repeats."""
        different = np.unique(np.asarray(numbers, np.int64))
        ends = np.searchsorted(different, starts)
        for number in range(len(self.sets)):
            if len(own := different[ends[number] : ends[number + 1]]):
                yield number, own.tolist()

    def _renumbered(self, number: int, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "images": [self._image_starts[number] + image for image in row["images"]]}
