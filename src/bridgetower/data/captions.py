"""Images with captions as training batches: one caption each, or a true one among false ones."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from bridgetower.data.batch import BatchKey, CaptionBatch, RankingBatch
from bridgetower.data.config import DataConfig, MaskingConfig
from bridgetower.data.masking import IGNORED, mask_tokens
from bridgetower.data.prepared import PreparedImages
from bridgetower.data.views import drop_words
from bridgetower.processor import Processor, TextBatch

DRAWN = -1
"""Number of a caption that is drawn each time."""


class CaptionImages(PreparedImages):
    """Images with their captions, numbered in the order in which their examples come; each caption of an image once.

    Attributes:
        owner: Number of the image of each example.
    """

    def __init__(self, config: DataConfig, splits: str | Sequence[str], processor: Processor) -> None:
        """Opens the sets.

        Raises:
            FileNotFoundError: A set or its split is missing.
            ValueError: No set is given, or one holds no captions.
        """
        super().__init__(config, splits, processor)
        numbers, places = np.unique(self.image_of.numpy(), return_inverse=True)
        first = np.full(len(numbers), len(places))
        np.minimum.at(first, places, np.arange(len(places)))
        order = first.argsort()
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        self._images = torch.from_numpy(numbers[order])
        self.owner = torch.from_numpy(rank[places])
        self._by_image = self.owner.argsort(stable=True)
        self._caption_ends = self.owner.bincount(minlength=len(order)).cumsum(0)

    def __len__(self) -> int:
        return len(self._images)

    def captions(self, images: Sequence[int]) -> list[list[str]]:
        """Returns all captions of each image."""
        numbers = [self._examples_of(image) for image in images]
        texts = iter(self.examples([number for own in numbers for number in own]))
        return [[next(texts)["entry"] for _ in own] for own in numbers]

    def names(self, images: Sequence[int]) -> list[str]:
        """Returns the name of each image."""
        return [example["id"] for example in self.examples([self._examples_of(image)[0] for image in images])]

    def all_captions(self) -> list[list[str]]:
        """Returns the captions of every image."""
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
        """Returns captions of every image, and the image that each belongs to.

        Args:
            max_captions: At most so many of an image, the first ones; None: all.
            owners: From `owners`: captions that images share are returned once, as those of the first one.
        """
        every = self.all_captions()
        shown = range(len(self)) if owners is None else owners.unique().tolist()
        chosen = [every[image][:max_captions] for image in shown]
        index = torch.tensor(shown).repeat_interleave(torch.tensor([len(captions) for captions in chosen]))
        return [caption for captions in chosen for caption in captions], index

    def identities(self, images: Sequence[int]) -> Int[Tensor, " b"]:
        """Returns a number for each image, which is the same for images with the same captions, in every process."""
        contents = (repr(captions).encode() for captions in self.captions(images))
        return torch.tensor([int.from_bytes(blake2b(content, digest_size=7).digest()) for content in contents])

    def pairs(self) -> Int[Tensor, "p 2"]:
        """Lists pairs of an image and an example to train on, which is `DRAWN` where a caption is drawn each time."""
        if self.config.captions == "all":
            examples = self.repeated(torch.arange(self.num_examples))
            return torch.stack([self.owner[examples], examples], dim=1)
        firsts = self._by_image[self._caption_ends - self.owner.bincount()]
        images = self.owner[self.repeated(firsts)]
        return torch.stack([images, torch.full_like(images, DRAWN)], dim=1)

    def chosen(self, pairs: Sequence[Sequence[int]], generator: torch.Generator) -> tuple[tuple[str, ...], list[str]]:
        """Returns the name and the caption of each pair, or a drawn one, with words dropped by the config."""
        numbers = []
        for image, number in pairs:
            own = self._examples_of(image)
            numbers.append(own[int(torch.randint(len(own), (), generator=generator))] if number == DRAWN else number)
        examples = self.examples(numbers)
        texts = [drop_words(example["entry"], self.config.word_dropout, generator) for example in examples]
        return tuple(example["id"] for example in examples), texts

    def _in_sets(self, images: Sequence[int]) -> Sequence[int]:
        found: list[int] = self._images[list(images)].tolist()
        return found

    def _examples_of(self, image: int) -> list[int]:
        start = int(self._caption_ends[image - 1]) if image else 0
        found: list[int] = self._by_image[start : self._caption_ends[image]].tolist()
        return found


class CaptionPairs(Dataset[CaptionBatch]):
    """(image, caption) pairs for training, addressed by batch."""

    def __init__(self, images: CaptionImages, masking: MaskingConfig | None) -> None:
        """Lists the pairs.

        Args:
            images: With their captions.
            masking: Which words are hidden; None hides none.
        """
        self.images, self.masking, self.config = images, masking, images.config
        self.pairs = images.pairs()

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def set_numbers(self) -> Int[Tensor, " n"]:
        """The set of each pair."""
        return _sets(self.images, self.pairs)

    def __getitem__(self, key: BatchKey) -> CaptionBatch:
        """Builds the batch that `key` names.

        Raises:
            ValueError: An image cannot be decoded; its name is in the error.
        """
        generator = torch.Generator().manual_seed(key.seed)
        ids, text, masked, labels = self._texts(key, generator)
        images = self.pairs[list(key.examples), 0]
        return CaptionBatch(
            pixel_values=self.images.views(images.tolist(), generator),
            input_ids=text.input_ids,
            attention_mask=text.attention_mask,
            masked_input_ids=masked,
            mlm_labels=labels,
            image_index=self.images.identities(images.tolist()),
            ids=ids,
            seed=key.seed,
            step_labels=torch.tensor(sum(map(self._num_labels, key.step))) if key.step else None,
        )

    def _num_labels(self, key: BatchKey) -> int:
        """Number of labels in the batch that `key` names, without reading its images."""
        *_, labels = self._texts(key, torch.Generator().manual_seed(key.seed))
        return int((labels != IGNORED).sum())

    def _texts(
        self, key: BatchKey, generator: torch.Generator
    ) -> tuple[tuple[str, ...], TextBatch, Int[Tensor, "b l"], Int[Tensor, "b l"]]:
        """Draws captions and hides words: names, the texts, masked ids and labels."""
        processor = self.images.processor
        ids, captions = self.images.chosen(self.pairs[list(key.examples)].tolist(), generator)
        text = processor.pad(processor.token_ids(captions, truncate=True))
        if self.masking is None:
            return ids, text, text.input_ids, torch.full_like(text.input_ids, IGNORED)
        masked, labels = mask_tokens(
            text.input_ids,
            config=self.masking,
            special_ids=processor.special_ids,
            mask_token_id=processor.mask_token_id,
            vocab_size=processor.vocab_size,
            generator=generator,
            continues_word=processor.continues_word if self.masking.whole_word else None,
        )
        return ids, text, masked, labels


class RankingPairs(Dataset[RankingBatch]):
    """(image, true caption) pairs with false captions of other images, addressed by batch.

    Official: a false caption is any of the set, now and then one of the image's own; here: of an image with other
    captions. Images with the same captions count as one.
    """

    def __init__(self, images: CaptionImages, false_texts: int) -> None:
        """Lists the pairs.

        Args:
            images: Their captions are the true and the false ones.
            false_texts: False captions of each pair.

        Raises:
            ValueError: All images have the same captions, so that none is false.
        """
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
        """The set of each pair."""
        return _sets(self.images, self._pairs)

    def __getitem__(self, key: BatchKey) -> RankingBatch:
        """Builds the batch that `key` names.

        Raises:
            ValueError: An image cannot be decoded; its id is named.
        """
        generator = torch.Generator().manual_seed(key.seed)
        pairs = self._pairs[list(key.examples)]
        chosen = [one for image, number in pairs.tolist() for one in self._with_false(image, number, generator)]
        (ids, texts), processor = self.images.chosen(chosen, generator), self.images.processor
        tokens = processor.pad(processor.token_ids(texts, truncate=True))
        return RankingBatch(
            pixel_values=self.images.views(pairs[:, 0].tolist(), generator),
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            image_index=self.images.identities(pairs[:, 0].tolist()),
            ids=ids[:: self.false_texts + 1],
            seed=key.seed,
        )

    def _with_false(self, image: int, number: int, generator: torch.Generator) -> list[tuple[int, int]]:
        group, count = self._group[image], len(self.images)  # the others begin after its end, in a circle
        after = torch.randint(count - int(self._sizes[group]), (self.false_texts,), generator=generator)
        others: list[int] = self._by_group[(self._ends[group] + after) % count].tolist()
        return [(image, number), *((other, DRAWN) for other in others)]


def _sets(images: CaptionImages, pairs: Int[Tensor, "p 2"]) -> Int[Tensor, " p"]:
    firsts = torch.full((len(images),), images.num_examples).scatter_reduce(
        0, images.owner, torch.arange(images.num_examples), "amin"
    )
    return images.sets_of(firsts[pairs[:, 0]])
