"""Masked words: does the model find them, and does it look at the picture?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from bridgetower.data.batch import CaptionBatch
from bridgetower.data.captions import CaptionImages, CaptionPairs
from bridgetower.data.config import MaskingConfig
from bridgetower.data.masking import IGNORED
from bridgetower.data.sampling import BatchKey, derive_seed
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.outputs import CachedFeatures
from bridgetower.objectives.losses import mlm_loss

BATCH_SIZE = 64


@torch.inference_mode()
def evaluate_masked_words(model: BridgeTower, images: CaptionImages, masking: MaskingConfig) -> dict[str, float]:
    """Returns loss and accuracy on hidden words with the right picture and with another picture of the set.

    Every pair counts, and at every call the same words are hidden and the same other pictures shown. The gap between
    `mlm_accuracy` and `mlm_wrong_image_accuracy` tells how much the model reads off the picture. A set of one picture
    has no other: the two `mlm_wrong_image_…` figures are then left out.

    Raises:
        ValueError: The model has no masked-language head, or a picture cannot be decoded.
    """
    device = next(model.parameters()).device
    kinds = ("", "wrong_image_") if len(images) > 1 else ("",)
    totals, words = torch.zeros(len(kinds), 2), 0
    for batch in caption_batches(CaptionPairs(images, masking)):
        count = int((batch.mlm_labels != IGNORED).sum())
        shown = [batch.pixel_values]
        if len(images) > 1:
            shown.append(images.pixel_values(other_images(batch.image_index, len(images), batch.seed).tolist()))
        totals += count * torch.stack([_loss(model, pixels.to(device), batch.to(device)) for pixels in shown])
        words += count
    means = (totals / max(words, 1)).tolist()
    names = ("loss", "accuracy")
    return {
        f"mlm_{kind}{name}": value
        for kind, row in zip(kinds, means, strict=True)
        for name, value in zip(names, row, strict=True)
    }


def caption_batches(pairs: CaptionPairs) -> Iterator[CaptionBatch]:
    """Yields every pair once, in order; the last batch may be smaller."""
    for start in range(0, len(pairs), BATCH_SIZE):
        rows = range(start, min(start + BATCH_SIZE, len(pairs)))
        yield pairs[BatchKey(tuple(rows), derive_seed("masked words", start))]


def other_images(image_index: Int[Tensor, " b"], num_images: int, seed: int) -> Int[Tensor, " b"]:
    """Draws for each picture another one of the set, all others alike.

    Raises:
        ValueError: There is no other.
    """
    if num_images < 2:
        raise ValueError(f"the set has {num_images} pictures; expected at least 2, so that there is another")
    generator = torch.Generator().manual_seed(seed)
    return (image_index + torch.randint(1, num_images, image_index.shape, generator=generator)) % num_images


def _loss(model: BridgeTower, pixel_values: Tensor | CachedFeatures, batch: CaptionBatch) -> Tensor:
    """Loss and accuracy [2] of a batch with some pictures, on the CPU."""
    text = model.encode_text(batch.masked_input_ids, batch.attention_mask)
    fused = model.fuse(model.encode_image(pixel_values), text, outputs="text")
    return torch.stack(mlm_loss(model.mlm_logits, fused.text, batch.mlm_labels)).cpu()
