"""Masked words: does the model find them, and does it look at the picture?"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from bridgetower.data.captions import CaptionImages, CaptionPairs, StepSampler
from bridgetower.data.config import MaskingConfig
from bridgetower.model.bridgetower import BridgeTower, Encoded
from bridgetower.tasks.losses import mlm_loss

BATCH_SIZE = 64


@torch.inference_mode()
def evaluate_masked_words(model: BridgeTower, images: CaptionImages, masking: MaskingConfig) -> dict[str, float]:
    """Returns loss and accuracy on hidden words with the right picture and with another picture of the batch.

    The same words are hidden at every call. The gap between `mlm_accuracy` and `mlm_wrong_image_accuracy` tells how
    much the model reads off the picture.
    """
    pairs = CaptionPairs(images, masking)
    batch_size = min(BATCH_SIZE, len(pairs))
    steps = range(len(pairs) // batch_size)
    totals, words = torch.zeros(4), 0
    device = next(model.parameters()).device
    for key in StepSampler(len(pairs), batch_size=batch_size, micro_batches=1, steps=steps, seed=0):
        batch = pairs[key].to(device)
        count = int((batch.mlm_labels >= 0).sum())
        image = model.encode_image(batch.pixel_values)
        text = model.encode_text(batch.masked_input_ids, batch.attention_mask)
        right = _loss(model, image, text, batch.mlm_labels)
        wrong = _loss(model, image[other_images(batch.image_index)], text, batch.mlm_labels)
        totals += count * torch.stack([*right, *wrong]).cpu()
        words += count
    names = ("mlm_loss", "mlm_accuracy", "mlm_wrong_image_loss", "mlm_wrong_image_accuracy")
    return dict(zip(names, (totals / max(words, 1)).tolist(), strict=True))


def other_images(image_index: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """Row of another picture for each row: the next one of the batch that is not the same picture."""
    count = len(image_index)
    order = (torch.arange(count)[:, None] + torch.arange(1, count + 1)) % count  # row b: b+1, b+2, …, b
    differs = image_index[order.to(image_index.device)] != image_index[:, None]
    return order.to(image_index.device)[torch.arange(count), differs.float().argmax(dim=1)]


def _loss(model: BridgeTower, image: Encoded, text: Encoded, labels: Tensor) -> tuple[Tensor, Tensor]:
    return mlm_loss(model.mlm_logits, model.fuse(image, text, read="text").text, labels)
