"""Images with one true and several false captions as training batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from bridgetower.data.batch import RankingBatch
from bridgetower.data.captions import DRAWN, CaptionImages
from bridgetower.data.sampling import BatchKey


class RankingPairs(Dataset[RankingBatch]):
    """(image, true caption) pairs with false captions of other images, addressed by batch.

    Official: a false caption is any of the set, now and then one of the image's own; here: never one of its own.
    """

    def __init__(self, images: CaptionImages, false_texts: int) -> None:
        """Lists the pairs.

        Args:
            images: Their captions are the true and the false ones.
            false_texts: False captions of each pair.

        Raises:
            ValueError: There is one image only, so that there are no false captions.
        """
        if len(images) < 2:
            raise ValueError(
                f"{', '.join(images.splits)} has {len(images)} image; expected at least 2 for false captions"
            )
        self.pictures, self.false_texts = images, false_texts
        self._pairs = images.pairs()

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, key: BatchKey) -> RankingBatch:
        """Builds the batch that `key` names.

        Raises:
            ValueError: A picture cannot be decoded; its id is named.
        """
        generator = torch.Generator().manual_seed(key.seed)
        chosen = self._pairs[list(key.examples)].tolist()
        texts = [text for image, number in chosen for text in self._texts(image, number, generator)]
        images, processor = [image for image, _ in chosen], self.pictures.processor
        tokens = processor.pad(processor.token_ids(texts, truncate=True))
        return RankingBatch(
            pixel_values=self.pictures.views(images, generator),
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            image_index=torch.tensor(images),
            ids=tuple(self.pictures.image_ids[image] for image in images),
            seed=key.seed,
        )

    def _texts(self, image: int, number: int, generator: torch.Generator) -> Sequence[str]:
        shifts = torch.randint(1, len(self.pictures), (self.false_texts,), generator=generator)
        others = ((image + shifts) % len(self.pictures)).tolist()
        return [
            self.pictures.caption(image, number, generator),
            *(self.pictures.caption(other, DRAWN, generator) for other in others),
        ]
