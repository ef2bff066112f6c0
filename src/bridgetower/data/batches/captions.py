"""Images with captions as training batches: one caption each, or a true one among false ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

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

DRAWN = -1  # number of a caption that is drawn each time


class CaptionImages(PreparedImages):
    """Images with their captions, numbered in the order in which their examples come; each caption of an image once."""

    def __init__(
        self, config: DataConfig, splits: str | Sequence[str], processor: Processor
    ) -> None:
        super().__init__(config, splits, processor)
        numbers, first, places = np.unique(
            self.image_of.numpy(), return_index=True, return_inverse=True
        )
        order = first.argsort()
        self._images = torch.from_numpy(numbers[order])
        self.owner = torch.from_numpy(order.argsort()[places])  # the image of each example
        self._by_image = self.owner.argsort(stable=True)
        self._caption_ends = self.owner.bincount(minlength=len(order)).cumsum(0)

    def __len__(self) -> int:
        return len(self._images)

    def captions(self, images: Sequence[int]) -> list[list[str]]:
        numbers = [self._examples_of(image) for image in images]
        texts = iter(self.examples([number for own in numbers for number in own]))
        return [[next(texts)["entry"] for _ in own] for own in numbers]

    def names(self, images: Sequence[int]) -> list[str]:
        return [
            example["id"]
            for example in self.examples([self._examples_of(image)[0] for image in images])
        ]

    def all_captions(self) -> list[list[str]]:
        found: list[list[str]] = [[] for _ in range(len(self))]
        for image, example in zip(self.owner.tolist(), self.scan(), strict=True):
            found[image].append(example["entry"])
        return found

    def owners(self) -> Int[Tensor, " n"]:
        """Returns the first image with the same captions as each image: itself where they are its own."""
        first: dict[tuple[str, ...], int] = {}
        every = enumerate(self.all_captions())
        return torch.tensor([first.setdefault(tuple(captions), image) for image, captions in every])

    def texts(
        self, max_captions: int | None = None, owners: Int[Tensor, " n"] | None = None
    ) -> tuple[list[str], Int[Tensor, " t"]]:
        """Returns captions of every image, and the image that each belongs to."""
        every = self.all_captions()
        shown = range(len(self)) if owners is None else owners.unique().tolist()
        chosen = [every[image][:max_captions] for image in shown]
        index = torch.tensor(shown).repeat_interleave(
            torch.tensor([len(captions) for captions in chosen])
        )
        return [caption for captions in chosen for caption in captions], index

    def pairs(self) -> Int[Tensor, "p 2"]:
        """Lists pairs of an image and an example to train on, which is `DRAWN` where a caption is drawn each time."""
        if self.config.captions == "all":
            examples = self.repeated(torch.arange(self.num_examples))
            return torch.stack([self.owner[examples], examples], dim=1)
        firsts = self._by_image[self._caption_ends - self.owner.bincount()]
        images = self.owner[self.repeated(firsts)]
        return torch.stack([images, torch.full_like(images, DRAWN)], dim=1)

    def set_numbers(self, images: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        return torch.searchsorted(
            torch.tensor(self._image_starts[1:]), self._images[images], right=True
        )

    def chosen(
        self,
        pairs: Sequence[Sequence[int]],
        generator: torch.Generator,
        identified: Sequence[int] = (),
    ) -> tuple[tuple[str, ...], list[str], Int[Tensor, " i"]]:
        """Returns names and captions of pairs, and a number for each identified image, the same for equal captions."""
        numbers = []
        for image, number in pairs:
            own = self._examples_of(image)
            numbers.append(
                own[int(torch.randint(len(own), (), generator=generator))]
                if number == DRAWN
                else number
            )
        captions = [self._examples_of(image) for image in identified]
        needed = list({*numbers, *(number for own in captions for number in own)})
        found = dict(zip(needed, self.examples(needed), strict=True))
        texts = [
            drop_words(found[number]["entry"], self.config.word_dropout, generator)
            for number in numbers
        ]
        contents = (repr([found[number]["entry"] for number in own]).encode() for own in captions)
        identities = [
            int.from_bytes(blake2b(content, digest_size=7).digest()) for content in contents
        ]
        return (
            tuple(found[number]["id"] for number in numbers),
            texts,
            torch.tensor(identities, dtype=torch.int64),
        )

    def _in_sets(self, images: Sequence[int]) -> Sequence[int]:
        found: list[int] = self._images[list(images)].tolist()
        return found

    def _examples_of(self, image: int) -> list[int]:
        start = int(self._caption_ends[image - 1]) if image else 0
        found: list[int] = self._by_image[start : self._caption_ends[image]].tolist()
        return found


class CaptionPairs(Dataset[CaptionBatch]):
    def __init__(
        self, images: CaptionImages, masking: MaskingConfig | None, *, with_images: bool = True
    ) -> None:
        self.images, self.masking, self.with_images = images, masking, with_images
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
        counts = [
            self._texts(other, torch.Generator().manual_seed(other.seed), ()).num_labels
            for other in key.step
        ]
        fields = self.images.fields(images, generator) if self.with_images else {}
        return replace(batch, **fields, step_labels=torch.stack(counts).sum() if counts else None)

    def _texts(
        self, key: BatchKey, generator: torch.Generator, identified: Sequence[int]
    ) -> CaptionBatch:
        processor = self.images.processor
        ids, captions, identities = self.images.chosen(
            self.pairs[list(key.examples)].tolist(), generator, identified
        )
        text = processor.pad(processor.token_ids(captions, truncate=True))
        masked, labels = text.input_ids, torch.full_like(text.input_ids, IGNORED)
        if self.masking is not None:
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
            input_ids=text.input_ids,
            attention_mask=text.attention_mask,
            masked_input_ids=masked,
            mlm_labels=labels,
            image_index=identities,
            ids=ids,
            seed=key.seed,
        )


class RankingPairs(Dataset[RankingBatch]):
    """(image, true caption) pairs with false captions of images with other captions.

    Official: a false caption is any of the set, now and then one of the image's own.
    """

    def __init__(self, images: CaptionImages, false_texts: int) -> None:
        owners = images.owners()
        _, self._group, self._sizes = owners.unique(return_inverse=True, return_counts=True)
        if len(self._sizes) < 2:
            raise ValueError(
                f"{', '.join(images.splits)} has no two images with different captions, so that there are no false "
                "captions; use more data"
            )
        self._by_group, self._ends = owners.argsort(stable=True), self._sizes.cumsum(0)
        self.images, self.false_texts = images, false_texts
        self._pairs = images.pairs()

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def set_numbers(self) -> Int[Tensor, " n"]:
        return self.images.set_numbers(self._pairs[:, 0])

    def __getitem__(self, key: BatchKey) -> RankingBatch:
        generator = torch.Generator().manual_seed(key.seed)
        pairs = self._pairs[list(key.examples)]
        chosen, num_images = list[tuple[int, int]](), len(self.images)
        for (
            image,
            number,
        ) in (
            pairs.tolist()
        ):  # images with other captions begin after the end of its group, in a circle
            group = self._group[image]
            after = torch.randint(
                num_images - int(self._sizes[group]), (self.false_texts,), generator=generator
            )
            others = self._by_group[(self._ends[group] + after) % num_images].tolist()
            chosen += [(image, number), *((other, DRAWN) for other in others)]
        images, processor = pairs[:, 0].tolist(), self.images.processor
        ids, texts, identities = self.images.chosen(chosen, generator, images)
        tokens = processor.pad(processor.token_ids(texts, truncate=True))
        return RankingBatch(
            **self.images.fields(images, generator),
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            image_index=identities,
            ids=ids[:: self.false_texts + 1],
            seed=key.seed,
        )
