"""Masked words: loss and accuracy with the right image and with a wrong one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import ceil

import torch

from bridgetower.data.batches.batch import Batch, BatchKey, CaptionBatch, derive_seed, joined
from bridgetower.data.batches.captions import CaptionImages, CaptionPairs
from bridgetower.data.config import MaskingConfig
from bridgetower.distributed import gather_by_id, rank, world_size
from bridgetower.evaluation.config import DEFAULTS, EvaluationOptions
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.objectives.losses import mlm_loss
from bridgetower.processor import load_items
from bridgetower.progress import counted

BATCH_SIZE = 64


class MaskedPairs:
    """Every pair of a set in order, in batches, with words hidden.

    The hidden words of a pair, and the other image that it is shown with, depend on its row alone.
    """

    def __init__(self, images: CaptionImages, masking: MaskingConfig) -> None:
        self.pairs = CaptionPairs(images, masking, with_images=False)

    def __len__(self) -> int:
        return ceil(len(self.pairs) / BATCH_SIZE)

    def __getitem__(self, batch_index: int) -> tuple[CaptionBatch, list[Batch]]:
        """Returns the texts of a batch and its images, followed by other images if the set has any."""
        images = self.pairs.images
        start = batch_index * BATCH_SIZE
        stop = min(start + BATCH_SIZE, len(self.pairs))
        rows = range(start, stop)
        texts = []
        for row in rows:
            pair = self.pairs[BatchKey((row,), derive_seed("masked words", row))]
            texts.append(replace(pair, attention_mask=torch.ones_like(pair.mlm_labels)))
        right_images: list[int] = self.pairs.pairs[start:stop, 0].tolist()
        image_batches = [images.batch(right_images)]
        if len(images) > 1:
            pairs = zip(right_images, rows, strict=True)
            wrong_images = [other_image(image, row, len(images)) for image, row in pairs]
            image_batches.append(images.batch(wrong_images))
        return joined(texts, seed=0), image_batches


@torch.inference_mode()
def evaluate_masked_words(
    model: BridgeTower,
    images: CaptionImages,
    masking: MaskingConfig,
    options: EvaluationOptions = DEFAULTS,
) -> dict[str, float]:
    """Returns loss and accuracy on hidden words with the right image and with another image of the set."""
    model.head("mlm")
    device = next(model.parameters()).device
    pairs = MaskedPairs(images, masking)
    local_batches = torch.arange(len(pairs))[rank() :: world_size()]
    loader: Iterable[tuple[CaptionBatch, list[Batch]]] = load_items(
        pairs.__getitem__, local_batches.tolist(), num_workers=options.num_workers, device=device
    )
    has_bar = options.progress and rank() == 0
    loader = counted(loader, "masked words", enabled=has_bar, total=len(local_batches))

    # Loss and accuracy are means over the hidden words of a batch, which is weighed by their number.
    prefixes = ("mlm_", "mlm_wrong_image_") if len(images) > 1 else ("mlm_",)
    means = torch.zeros(len(local_batches), len(prefixes), 2, dtype=torch.float64)
    num_words = torch.zeros(len(local_batches), dtype=torch.int64)
    for batch_index, (texts, image_batches) in enumerate(loader):
        num_words[batch_index] = texts.num_labels
        texts = texts.to(device)
        text = model.encode_text(texts.masked_input_ids, texts.attention_mask)
        for kind, image_batch in enumerate(image_batches):
            image_batch = images.on_device(image_batch, device)
            image = model.encode_image(image_batch.pixel_values, states=image_batch.image_states)
            fused = model.fuse(image, text, outputs="text")
            loss, accuracy = mlm_loss(model.mlm_logits, fused.text, texts.mlm_labels)
            means[batch_index, kind] = torch.stack([loss, accuracy]).cpu()
    sums = means * num_words[:, None, None]
    _, sums, num_words = gather_by_id(local_batches, sums, num_words)

    metrics = {}
    per_word = sums.sum(dim=0) / max(int(num_words.sum()), 1)
    for prefix, (loss, accuracy) in zip(prefixes, per_word.tolist(), strict=True):
        metrics[f"{prefix}loss"] = loss
        metrics[f"{prefix}accuracy"] = accuracy
    return metrics


def other_image(image: int, row: int, num_images: int) -> int:
    """Draws another image of a set uniformly, by the row of the pair that it is shown with."""
    return (image + 1 + derive_seed("other image", row) % (num_images - 1)) % num_images
