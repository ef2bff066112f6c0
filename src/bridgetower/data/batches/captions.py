"""Images with captions as training batches, with one caption per image or a true one among false ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from bridgetower.data.batches.batch import (
    IGNORED,
    BatchKey,
    CaptionBatch,
    RankingBatch,
    mask_tokens,
)
from bridgetower.data.batches.examples import PreparedImages
from bridgetower.data.batches.views import drop_words
from bridgetower.data.config import DataConfig, MaskingConfig
from bridgetower.processor import Processor

DRAWN = -1  # example number of a pair whose caption is drawn each time


class DrawnCaptions(NamedTuple):
    """Captions of pairs, after draws and dropped words."""

    names: tuple[str, ...]
    texts: list[str]
    identities: Int[Tensor, " i"]  # of images, equal for images with the same captions


class CaptionImages(PreparedImages):
    """Images with all their captions, numbered in the order of their first examples."""

    def __init__(
        self, config: DataConfig, splits: str | Sequence[str], processor: Processor
    ) -> None:
        super().__init__(config, splits, processor)
        numbers, first_examples, indices = np.unique(
            self.image_of.numpy(), return_index=True, return_inverse=True
        )
        # Images in the order of their first examples.
        order = first_examples.argsort()
        self._numbers = torch.from_numpy(numbers[order])  # of the images, through all sets
        self.owner = torch.from_numpy(order.argsort()[indices])  # the image of each example

        # The examples of image n are the `_num_captions[n]` entries of `_by_image` before `_caption_ends[n]`.
        self._by_image = self.owner.argsort(stable=True)
        self._num_captions = self.owner.bincount(minlength=len(order))
        self._caption_ends = self._num_captions.cumsum(0)

    def __len__(self) -> int:
        return len(self._numbers)

    def captions(self, images: Sequence[int]) -> list[list[str]]:
        numbers = [self._examples_of(image) for image in images]
        examples = iter(self.examples([number for of_image in numbers for number in of_image]))
        return [[next(examples)["entry"] for _ in of_image] for of_image in numbers]

    def names(self, images: Sequence[int]) -> list[str]:
        first_examples = [self._examples_of(image)[0] for image in images]
        return [example["id"] for example in self.examples(first_examples)]

    def all_captions(self) -> list[list[str]]:
        captions: list[list[str]] = [[] for _ in range(len(self))]
        for image, example in zip(self.owner.tolist(), self.scan(), strict=True):
            captions[image].append(example["entry"])
        return captions

    def owners(self) -> Int[Tensor, " n"]:
        """Returns for each image the first image with the same captions, often itself."""
        first_images: dict[tuple[str, ...], int] = {}
        owners = []
        for image, captions in enumerate(self.all_captions()):
            owners.append(first_images.setdefault(tuple(captions), image))
        return torch.tensor(owners)

    def texts(
        self, max_captions: int | None = None, owners: Int[Tensor, " n"] | None = None
    ) -> tuple[list[str], Int[Tensor, " t"]]:
        """Returns captions and the image of each, optionally of different owners only."""
        captions = self.all_captions()
        images = range(len(self)) if owners is None else owners.unique().tolist()
        texts: list[str] = []
        image_index: list[int] = []
        for image in images:
            selected = captions[image][:max_captions]
            texts += selected
            image_index += [image] * len(selected)
        return texts, torch.tensor(image_index)

    def pairs(self) -> Int[Tensor, "p 2"]:
        """Lists (image, example) to train on. The example is `DRAWN` where a caption is drawn at each step."""
        if self.config.captions == "all":
            examples = self.with_repeats(torch.arange(self.num_examples))
            return torch.stack([self.owner[examples], examples], dim=1)
        starts = self._caption_ends - self._num_captions
        first_examples = self._by_image[starts]
        images = self.owner[self.with_repeats(first_examples)]
        return torch.stack([images, torch.full_like(images, DRAWN)], dim=1)

    def set_numbers(self, images: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        ends = torch.tensor(self._image_starts[1:])
        return torch.searchsorted(ends, self._numbers[images], right=True)

    def draw_captions(
        self,
        pairs: Sequence[Sequence[int]],
        generator: torch.Generator,
        identified: Sequence[int] = (),
    ) -> DrawnCaptions:
        """Returns the captions of pairs, and an identity of each image of `identified`.

        Images with the same captions have the same identity.
        """
        # One read of all examples.
        numbers = []
        for image, number in pairs:
            if number == DRAWN:
                choices = self._examples_of(image)
                number = choices[int(torch.randint(len(choices), (), generator=generator))]
            numbers.append(number)
        examples_of_images = [self._examples_of(image) for image in identified]
        needed = list(set(numbers).union(*examples_of_images))
        examples = dict(zip(needed, self.examples(needed), strict=True))

        texts = []
        for number in numbers:
            caption = examples[number]["entry"]
            texts.append(drop_words(caption, self.config.word_dropout, generator))
        identities = []
        for members in examples_of_images:
            captions = [examples[number]["entry"] for number in members]
            # Seven bytes fit into a signed int64.
            digest = blake2b(repr(captions).encode(), digest_size=7).digest()
            identities.append(int.from_bytes(digest))
        return DrawnCaptions(
            names=tuple(examples[number]["id"] for number in numbers),
            texts=texts,
            identities=torch.tensor(identities, dtype=torch.int64),
        )

    def _image_numbers(self, images: Sequence[int]) -> Sequence[int]:
        numbers: list[int] = self._numbers[list(images)].tolist()
        return numbers

    def _examples_of(self, image: int) -> list[int]:
        end = self._caption_ends[image]
        numbers: list[int] = self._by_image[end - self._num_captions[image] : end].tolist()
        return numbers


class CaptionPairs(Dataset[CaptionBatch]):
    """Pairs of an image and a caption as batches, with masked words.

    Args:
        images: The images with their captions.
        masking: How words are masked; None masks none.
        with_images: Whether batches have pixels.
    """

    def __init__(
        self, images: CaptionImages, masking: MaskingConfig | None, *, with_images: bool = True
    ) -> None:
        self.images = images
        self.masking = masking
        self.with_images = with_images
        self.pairs = images.pairs()

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def set_numbers(self) -> Int[Tensor, " n"]:
        return self.images.set_numbers(self.pairs[:, 0])

    def __getitem__(self, key: BatchKey) -> CaptionBatch:
        generator = torch.Generator().manual_seed(key.seed)
        images = self.pairs[list(key.examples), 0].tolist()
        batch = self._texts(key, generator, images)
        if key.step:
            counts = []
            for other in key.step:
                other_generator = torch.Generator().manual_seed(other.seed)
                counts.append(self._texts(other, other_generator, ()).num_labels)
            batch = replace(batch, step_labels=torch.stack(counts).sum())
        if self.with_images:
            batch = replace(batch, **self.images.fields(images, generator))
        return batch

    def _texts(
        self, key: BatchKey, generator: torch.Generator, identified: Sequence[int]
    ) -> CaptionBatch:
        """Returns a batch without images, whose draws come before those of the images."""
        processor = self.images.processor
        pairs = self.pairs[list(key.examples)].tolist()
        captions = self.images.draw_captions(pairs, generator, identified)
        tokens = processor.pad(processor.token_ids(captions.texts, truncate=True))
        masked_input_ids = tokens.input_ids
        labels = torch.full_like(tokens.input_ids, IGNORED)
        if self.masking is not None:
            masked_input_ids, labels = mask_tokens(
                tokens.input_ids,
                config=self.masking,
                special_ids=processor.special_ids,
                mask_token_id=processor.mask_token_id,
                vocab_size=processor.vocab_size,
                generator=generator,
                continues_word=processor.continues_word if self.masking.whole_word else None,
            )
        return CaptionBatch(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            masked_input_ids=masked_input_ids,
            mlm_labels=labels,
            image_index=captions.identities,
            ids=captions.names,
            seed=key.seed,
        )


class RankingPairs(Dataset[RankingBatch]):
    """Pairs of an image and its caption, with false captions of images that have other captions.

    In the official code a false caption is any of the set, now and then one of the same image.
    """

    def __init__(self, images: CaptionImages, false_texts: int) -> None:
        owners = images.owners()
        _, self._group, self._sizes = owners.unique(return_inverse=True, return_counts=True)
        if len(self._sizes) < 2:
            raise ValueError(
                f"{', '.join(images.splits)} has no two images with different captions, so that there are no false "
                "captions; use more data"
            )
        self._by_group = owners.argsort(stable=True)
        self._ends = self._sizes.cumsum(0)
        self.images = images
        self.false_texts = false_texts
        self._pairs = images.pairs()

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def set_numbers(self) -> Int[Tensor, " n"]:
        return self.images.set_numbers(self._pairs[:, 0])

    def __getitem__(self, key: BatchKey) -> RankingBatch:
        generator = torch.Generator().manual_seed(key.seed)
        pairs = self._pairs[list(key.examples)]
        num_images = len(self.images)
        ranked_pairs: list[tuple[int, int]] = []
        for image, number in pairs.tolist():
            ranked_pairs.append((image, number))
            # In a circle, images with other captions begin where the group of the image ends.
            group = self._group[image]
            num_others = num_images - int(self._sizes[group])
            offsets = torch.randint(num_others, (self.false_texts,), generator=generator)
            false_images = self._by_group[(self._ends[group] + offsets) % num_images]
            ranked_pairs += [(false_image, DRAWN) for false_image in false_images.tolist()]
        images = pairs[:, 0].tolist()
        processor = self.images.processor
        captions = self.images.draw_captions(ranked_pairs, generator, images)
        tokens = processor.pad(processor.token_ids(captions.texts, truncate=True))
        return RankingBatch(
            **self.images.fields(images, generator),
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            image_index=captions.identities,
            ids=captions.names[:: self.false_texts + 1],
            seed=key.seed,
        )
