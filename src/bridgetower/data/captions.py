"""Images with captions as training batches: one caption each, or a true one among false ones."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from bridgetower.data.batch import BatchKey, CaptionBatch, RankingBatch
from bridgetower.data.config import DataConfig, MaskingConfig
from bridgetower.data.masking import IGNORED, mask_tokens
from bridgetower.data.parquet import Column
from bridgetower.data.prepared import PreparedImages
from bridgetower.data.views import drop_words
from bridgetower.processor import Processor, TextBatch

DRAWN = -1
"""Number of a caption that is drawn each time."""


class CaptionImages(PreparedImages):
    """Images with their captions, each caption of an image once, as in the official code (base_dataset.py)."""

    def __init__(self, config: DataConfig, splits: str | Sequence[str], processor: Processor) -> None:
        """Opens the folders and reads the captions."""
        super().__init__(config, splits, processor)
        self.captions: Column[list[str]] = Column.read(self.records, self.schema.entries).without_repeats()

    def owners(self) -> Int[Tensor, " n"]:
        """Returns the first image with the same captions as each image: itself where they are its own."""
        first: dict[tuple[str, ...], int] = {}
        return torch.tensor([first.setdefault(tuple(captions), image) for image, captions in enumerate(self.captions)])

    def texts(
        self, max_captions: int | None = None, owners: Int[Tensor, " n"] | None = None
    ) -> tuple[list[str], Int[Tensor, " t"]]:
        """Returns captions of every image, and the image that each belongs to.

        Args:
            max_captions: At most so many of an image, the first ones; None: all.
            owners: From `owners`: captions that images share are returned once, as those of the first one.
        """
        shown = range(len(self)) if owners is None else owners.unique().tolist()
        chosen = [self.captions[image][:max_captions] for image in shown]
        index = torch.tensor(shown).repeat_interleave(torch.tensor([len(captions) for captions in chosen]))
        return [caption for captions in chosen for caption in captions], index

    def identities(self, images: Sequence[int]) -> Int[Tensor, " b"]:
        """Returns a number for each image, which is the same for images with the same captions, in every process."""
        contents = (repr(self.captions[image]).encode() for image in images)
        return torch.tensor([int.from_bytes(blake2b(content, digest_size=7).digest()) for content in contents])

    def pairs(self) -> Int[Tensor, "p 2"]:
        """Lists (image, caption number) pairs to train on; the number is `DRAWN` where a caption is drawn each time."""
        drawn = self.config.captions != "all"
        pairs = self.places(torch.ones(len(self), dtype=torch.int64) if drawn else self.captions.lengths())
        if drawn:
            pairs[:, 1] = DRAWN
        return pairs

    def caption(self, image: int, number: int, generator: torch.Generator) -> str:
        """Returns a caption of an image, or a drawn one, with words dropped by the config."""
        captions = self.captions[image]
        if number == DRAWN:
            number = int(torch.randint(len(captions), (), generator=generator))
        return drop_words(captions[number], self.config.word_dropout, generator)


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
    def image_numbers(self) -> Int[Tensor, " n"]:
        """The image of each pair."""
        return self.pairs[:, 0].long()

    def __getitem__(self, key: BatchKey) -> CaptionBatch:
        """Builds the batch that `key` names."""
        generator = torch.Generator().manual_seed(key.seed)
        text, masked, labels = self._texts(key, generator)
        images = self.pairs[list(key.examples), 0].tolist()
        return CaptionBatch(
            pixel_values=self.images.views(images, generator),
            input_ids=text.input_ids,
            attention_mask=text.attention_mask,
            masked_input_ids=masked,
            mlm_labels=labels,
            image_index=self.images.identities(images),
            ids=tuple(self.images.image_ids[image] for image in images),
            seed=key.seed,
            step_labels=torch.tensor(sum(map(self._num_labels, key.step))) if key.step else None,
        )

    def _num_labels(self, key: BatchKey) -> int:
        """Number of labels in the batch that `key` names, without reading its images."""
        _, _, labels = self._texts(key, torch.Generator().manual_seed(key.seed))
        return int((labels != IGNORED).sum())

    def _texts(
        self, key: BatchKey, generator: torch.Generator
    ) -> tuple[TextBatch, Int[Tensor, "b l"], Int[Tensor, "b l"]]:
        """Draws captions and hides words: the texts, masked ids and labels."""
        processor = self.images.processor
        chosen = self.pairs[list(key.examples)].tolist()
        captions = [self.images.caption(image, number, generator) for image, number in chosen]
        text = processor.pad(processor.token_ids(captions, truncate=True))
        if self.masking is None:
            return text, text.input_ids, torch.full_like(text.input_ids, IGNORED)
        masked, labels = mask_tokens(
            text.input_ids,
            config=self.masking,
            special_ids=processor.special_ids,
            mask_token_id=processor.mask_token_id,
            vocab_size=processor.vocab_size,
            generator=generator,
            continues_word=processor.continues_word if self.masking.whole_word else None,
        )
        return text, masked, labels


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
    def image_numbers(self) -> Int[Tensor, " n"]:
        """The image of each pair."""
        return self._pairs[:, 0].long()

    def __getitem__(self, key: BatchKey) -> RankingBatch:
        """Builds the batch that `key` names."""
        generator = torch.Generator().manual_seed(key.seed)
        chosen = self._pairs[list(key.examples)].tolist()
        texts = [text for image, number in chosen for text in self._texts(image, number, generator)]
        images, processor = [image for image, _ in chosen], self.images.processor
        tokens = processor.pad(processor.token_ids(texts, truncate=True))
        return RankingBatch(
            pixel_values=self.images.views(images, generator),
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            image_index=self.images.identities(images),
            ids=tuple(self.images.image_ids[image] for image in images),
            seed=key.seed,
        )

    def _texts(self, image: int, number: int, generator: torch.Generator) -> Sequence[str]:
        group, count = self._group[image], len(self.images)  # the others begin after its end, in a circle
        after = torch.randint(count - int(self._sizes[group]), (self.false_texts,), generator=generator)
        others = self._by_group[(self._ends[group] + after) % count].tolist()
        return [
            self.images.caption(image, number, generator),
            *(self.images.caption(other, DRAWN, generator) for other in others),
        ]
