"""The images of prepared sets, decoded one by one."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from bridgetower.data.batch import CachedFeatures
from bridgetower.data.config import DataConfig
from bridgetower.data.folder import read_split, split_digests
from bridgetower.data.frozen import FrozenImages
from bridgetower.data.parquet import Column, ParquetRows
from bridgetower.data.schema import CAPTIONS, Schema
from bridgetower.data.shards import RemoteRows, open_rows, shown_place
from bridgetower.data.views import augment, own_transform, random_view, transformed
from bridgetower.processor import Processor


class PreparedImages:
    """The images of one or more splits of several prepared folders, with their entries, such as captions.

    Attributes:
        sources: Each folder, with the splits that are read of it.
        rows: Number of each image among those of all folders.
        image_ids: Their names.
        frozen: Cached features of a frozen image tower, which `views` and `pixel_values` then return; None: pixels.
    """

    def __init__(
        self, config: DataConfig, splits: str | Sequence[str], processor: Processor, *, schema: Schema = CAPTIONS
    ) -> None:
        """Opens the folders.

        Args:
            config: Folders, and how images are varied.
            splits: One or several, whose images are joined.
            processor: Resizes and normalises.
            schema: What the rows hold.

        Raises:
            FileNotFoundError: A folder or its split is missing.
            ValueError: No folder is given, or one holds another kind.
        """
        if not config.folders:
            raise ValueError("no data folder given; pass --data.folders DIR, made by `bridgetower prepare`")
        self.config, self.processor, self.schema = config, processor, schema
        self.splits = (splits,) if isinstance(splits, str) else tuple(splits)
        self.sources = [(Path(folder), self.splits) for folder in config.folders]
        self.sources += [(Path(folder), ("train",)) for folder in config.train_only]
        self.records = [self._open(*source) for source in self.sources]
        self._ends = list(accumulate(map(len, self.records)))
        starts = [0, *self._ends]
        self._file_ends = [
            start + end for start, each in zip(starts, self.records, strict=False) for end in each.file_ends
        ]
        self.rows = range(self._ends[-1])
        self.image_ids: Column[str] = Column.read(self.records, "image_id")
        if config.transform is not None:
            own_transform(config.transform)  # a wrong name is an error here, not in the first batch of a worker
        self.frozen: FrozenImages | None = None
        self.raw = False
        self._cache: dict[tuple[int, str], Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def digests(self) -> dict[str, str]:
        """Returns the digest of every file that is read, by path.

        Raises:
            FileNotFoundError: A folder has no `dataset.json`.
            ValueError: It does not name the split.
        """
        return {
            f"{shown_place(folder)}/{name}": digest
            for folder, splits in self.sources
            for split in splits
            for name, digest in split_digests(folder, split).items()
        }

    @property
    def remote(self) -> bool:
        """Whether images are at URLs, so that the order in which they are read matters."""
        return any(isinstance(records, RemoteRows) for records in self.records)

    def sets_of(self, images: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Returns the number of the set of each image."""
        return torch.searchsorted(torch.tensor(self._ends), images, right=True)

    def shards_of(self, images: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Returns the file of each image, counted over all folders."""
        return torch.searchsorted(torch.tensor(self._file_ends), images, right=True)

    def fetch(self, shard: int) -> None:
        """Copies the file of some images to the cache, if it is at a URL and not there.

        Args:
            shard: Its number, as from `shards_of`.

        Raises:
            OSError: It cannot be read.
        """
        counts = list(accumulate(len(records.paths) for records in self.records))
        folder = bisect_right(counts, shard)
        records = self.records[folder]
        if isinstance(records, RemoteRows):
            records.fetch(shard - (counts[folder - 1] if folder else 0))

    def places(self, lengths: Int[Tensor, " n"]) -> Int[Tensor, "p 2"]:
        """Lists (image, number of an entry there) of every example of an epoch, each `repeats` times.

        Args:
            lengths: Number of entries of each image.
        """
        counts = lengths
        if self.config.repeats:
            folders = torch.tensor([len(records) for records in self.records])
            counts = lengths * torch.tensor(self.config.repeats).repeat_interleave(folders)
        images = torch.repeat_interleave(counts)
        numbers = (torch.arange(len(images)) - (counts.cumsum(0) - counts)[images]) % lengths[images]
        return torch.stack([images.int(), numbers.int()], dim=1)

    def entries(self) -> Iterator[list[Any]]:
        """Yields the captions, questions or statements of every image, one row group in memory at a time."""
        for records in self.records:
            yield from records.stream(self.schema.entries)

    def entries_of(self, image: int) -> list[Any]:
        """Returns the captions, questions or statements of an image."""
        folder, row = self._place(image)
        column = self.schema.entries
        found: list[Any] = self.records[folder].row(row, [column])[column]
        return found

    def pixels(self, image: int, column: str = "image") -> UInt8[Tensor, "3 h w"]:
        """Returns a resized image.

        Args:
            image: Its number.
            column: `image`, or `image_2` for the second one of a pair.

        Raises:
            ValueError: It cannot be decoded; its id is named.
        """
        if (image, column) in self._cache:
            return self._cache[image, column]
        with self._named(image):
            content = self.content(image, column)
            pixels = self.processor.resize(self.processor.blank_image() if content is None else content)
        if self.config.cache:
            self._cache[image, column] = pixels
        return pixels

    def views(
        self, images: Sequence[int], generator: torch.Generator, column: str = "image"
    ) -> Float[Tensor, "b 3 h w"] | UInt8[Tensor, "b 3 h w"] | CachedFeatures:
        """Returns images, augmented as configured and normalised, unless `raw` leaves that to who has them on a GPU.

        Raises:
            ValueError: One cannot be decoded; its id is named.
        """
        if self.frozen is not None:
            return self.frozen.views(images, generator, column)
        pixels = torch.stack([self._view(image, column, generator) for image in images])
        pixels = augment(pixels, self.config.augmentation, generator)
        if self.config.transform is not None:
            pixels = transformed(pixels, self.config.transform, generator)
        return pixels if self.raw else self.processor.normalise(pixels)

    def pixel_values(self, images: Sequence[int]) -> Float[Tensor, "b 3 h w"] | CachedFeatures:
        """Returns normalised images, of a pair the first one."""
        if self.frozen is not None:
            return self.frozen.first_views(images)
        return self.processor.normalise(torch.stack([self.pixels(image) for image in images]))

    def image_bytes(self, image: int, column: str = "image") -> bytes:
        """Returns an image's file as it was prepared."""
        content = self.content(image, column)
        assert content is not None  # only a schema whose images are optional has rows without
        return content

    def content(self, image: int, column: str) -> bytes | None:
        """Returns an image's file as it was prepared; None where a row has no image."""
        folder, row = self._place(image)
        cell = self.records[folder].row(row, [column])[column]
        return None if cell is None else cell["bytes"]

    def _place(self, image: int) -> tuple[int, int]:
        """Returns the number of an image's folder, and its row there."""
        row = self.rows[image]
        folder = bisect_right(self._ends, row)
        return folder, row - (self._ends[folder - 1] if folder else 0)

    def _open(self, folder: Path, splits: Sequence[str]) -> ParquetRows:
        paths = [path for split in splits for path in read_split(folder, split, schema=self.schema).paths]
        return open_rows(paths, keep=math.inf if self.config.cache else 0)

    def _view(self, image: int, column: str, generator: torch.Generator) -> UInt8[Tensor, "3 h w"]:
        if not self.config.has_views:
            return self.pixels(image, column)
        content = self.content(image, column)
        if content is None:
            return self.pixels(image, column)
        with self._named(image):
            return random_view(content, self.config, self.processor, generator)

    @contextmanager
    def _named(self, image: int) -> Iterator[None]:
        """Adds the image's name to errors."""
        try:
            yield
        except ValueError as error:
            folder, _ = self.sources[self._place(image)[0]]
            raise ValueError(f"image {self.image_ids[image]} of {shown_place(folder)}: {error}") from error
