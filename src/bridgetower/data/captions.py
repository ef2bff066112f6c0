"""Images with captions as training batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from bridgetower.data.augmentation import augment, drop_words
from bridgetower.data.batch import CaptionBatch
from bridgetower.data.config import DataConfig, MaskingConfig
from bridgetower.data.info import split_digests
from bridgetower.data.masking import mask_tokens
from bridgetower.data.sampling import BatchKey
from bridgetower.data.splits import read_split
from bridgetower.data.views import random_view
from bridgetower.processor import Processor


class CaptionImages:
    """The pictures of one split of several prepared folders, with their captions."""

    def __init__(self, config: DataConfig, split: str, processor: Processor) -> None:
        """Opens the folders; pictures are decoded when they are asked for.

        Raises:
            FileNotFoundError: A folder or its split is missing.
            ValueError: No folder is given.
        """
        if not config.folders:
            raise ValueError("no data folder given; pass --data.folders DIR, made by `bridgetower prepare`")
        self.config, self.split, self.processor = config, split, processor
        self.records = [read_split(Path(folder), split) for folder in config.folders]
        self.rows = [(folder, row) for folder, records in enumerate(self.records) for row in range(len(records))]
        self.captions: list[list[str]] = [
            captions for records in self.records for captions in records.column("captions")
        ]
        self.image_ids: list[str] = [name for records in self.records for name in records.column("image_id")]
        self._cache: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def digests(self) -> dict[str, str]:
        """Returns the digest of every file that is read, by path.

        Raises:
            FileNotFoundError: A folder has no `dataset.json`.
            ValueError: It does not name the split.
        """
        return {
            str(Path(folder) / name): digest
            for folder in self.config.folders
            for name, digest in split_digests(Path(folder), self.split).items()
        }

    def pixels(self, image: int) -> UInt8[Tensor, "3 h w"]:
        """Returns a resized picture.

        Raises:
            ValueError: It cannot be decoded; its id is named.
        """
        if image in self._cache:
            return self._cache[image]
        with self._named(image):
            pixels = self.processor.resize(self.image_bytes(image))
        if self.config.cache:
            self._cache[image] = pixels
        return pixels

    def views(self, images: Sequence[int], generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
        """Returns normalised pictures, varied as the config says.

        Raises:
            ValueError: One cannot be decoded; its id is named.
        """
        pixels = torch.stack([self._view(image, generator) for image in images])
        return self.processor.normalise(augment(pixels, self.config.augmentation, generator))

    def _view(self, image: int, generator: torch.Generator) -> UInt8[Tensor, "3 h w"]:
        if not self.config.has_views:
            return self.pixels(image)
        with self._named(image):
            return random_view(self.image_bytes(image), self.config, self.processor, generator)

    @contextmanager
    def _named(self, image: int) -> Iterator[None]:
        """Adds the picture's name to errors."""
        try:
            yield
        except ValueError as error:
            folder = self.config.folders[self.rows[image][0]]
            raise ValueError(f"picture {self.image_ids[image]} of {folder}: {error}") from error

    def image_bytes(self, image: int) -> bytes:
        """Returns a picture's file as it was prepared."""
        folder, row = self.rows[image]
        content: bytes = self.records[folder].row(row, ["image"])["image"]["bytes"]
        return content

    def pixel_values(self, images: Sequence[int]) -> Float[Tensor, "b 3 h w"]:
        """Returns normalised pictures."""
        return self.processor.normalise(torch.stack([self.pixels(image) for image in images]))

    def texts(self, max_captions: int | None = None) -> tuple[list[str], Int[Tensor, " t"]]:
        """Returns the first `max_captions` captions of every picture, and the picture that each belongs to."""
        chosen = [captions[:max_captions] for captions in self.captions]
        index = torch.repeat_interleave(torch.tensor([len(captions) for captions in chosen]))
        return [caption for captions in chosen for caption in captions], index

    def pairs(self) -> list[tuple[int, int | None]]:
        """Lists (image, caption number) pairs to train on; the number is None where a caption is drawn each time."""
        repeats = self.config.repeats or (1,) * len(self.config.folders)
        pairs: list[tuple[int, int | None]] = []
        for image, (folder, _) in enumerate(self.rows):
            count = len(self.captions[image])
            numbers: Sequence[int | None] = range(count) if self.config.captions == "all" else [None]
            pairs += [(image, number) for number in numbers] * repeats[folder]
        return pairs

    def caption(self, image: int, number: int | None, generator: torch.Generator) -> str:
        """Returns a caption of a picture, or a drawn one, with words dropped as the config says."""
        captions = self.captions[image]
        if number is None:
            number = int(torch.randint(len(captions), (), generator=generator))
        return drop_words(captions[number], self.config.word_dropout, generator)


class CaptionPairs(Dataset[CaptionBatch]):
    """(image, caption) pairs for training, addressed by batch."""

    def __init__(self, images: CaptionImages, masking: MaskingConfig) -> None:
        self.images, self.masking, self.config = images, masking, images.config
        self.pairs = images.pairs()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: BatchKey) -> CaptionBatch:
        """Builds the batch that `key` names.

        Raises:
            ValueError: A picture cannot be decoded; its id is named.
        """
        generator = torch.Generator().manual_seed(key.seed)
        chosen = [self.pairs[pair] for pair in key.examples]
        processor = self.images.processor
        captions = [self.images.caption(image, number, generator) for image, number in chosen]
        text = processor.pad(processor.token_ids(captions, truncate=True))
        masked, labels = mask_tokens(
            text.input_ids,
            config=self.masking,
            special_ids=processor.special_ids,
            mask_token_id=processor.mask_token_id,
            vocab_size=processor.vocab_size,
            generator=generator,
            continues_word=processor.continues_word if self.masking.whole_word else None,
        )
        return CaptionBatch(
            pixel_values=self.images.views([image for image, _ in chosen], generator),
            input_ids=text.input_ids,
            attention_mask=text.attention_mask,
            masked_input_ids=masked,
            mlm_labels=labels,
            image_index=torch.tensor([image for image, _ in chosen]),
            ids=tuple(self.images.image_ids[image] for image, _ in chosen),
            seed=key.seed,
        )
