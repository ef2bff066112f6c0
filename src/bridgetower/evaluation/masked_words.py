"""Masked words: loss and accuracy with the right image and with a wrong one."""

from __future__ import annotations

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
    """Batches of all pairs of a set, in order, with masked words.

    The masked words of a pair and its wrong image depend on its row alone, not on the size of batches.
    """

    def __init__(self, images: CaptionImages, masking: MaskingConfig) -> None:
        self.images = images
        self.pairs = CaptionPairs(images, masking, with_images=False)

    def __len__(self) -> int:
        return ceil(len(self.pairs) / BATCH_SIZE)

    def __getitem__(self, batch_index: int) -> tuple[CaptionBatch, list[Batch]]:
        """Returns the texts of a batch and their images, and a wrong image of each if the set has others."""
        start = batch_index * BATCH_SIZE
        stop = min(start + BATCH_SIZE, len(self.pairs))
        num_images = len(self.images)
        has_others = num_images > 1
        texts = []
        right_images = []
        wrong_images = []
        for row in range(start, stop):
            key = BatchKey((row,), derive_seed("masked words", row))
            text = self.pairs[key]
            # A single text has no mask. `joined` pads masks, and so makes the mask of the batch.
            mask = torch.ones_like(text.input_ids)
            texts.append(replace(text, attention_mask=mask))
            image = int(self.pairs.pairs[row, 0])
            right_images.append(image)
            if has_others:
                wrong_images.append(other_image(image, row, num_images))
        image_batches = [self.images.batch(right_images)]
        if has_others:
            image_batches.append(self.images.batch(wrong_images))
        return joined(texts, seed=0), image_batches


@torch.inference_mode()
def evaluate_masked_words(
    model: BridgeTower,
    images: CaptionImages,
    masking: MaskingConfig,
    options: EvaluationOptions = DEFAULTS,
) -> dict[str, float]:
    """Returns loss and accuracy on masked words with the right image and with another image of the set."""
    model.head("mlm")
    device = model.device
    pairs = MaskedPairs(images, masking)
    local_batches = torch.arange(len(pairs))[rank() :: world_size()]
    loaded = load_items(
        pairs.__getitem__, local_batches.tolist(), num_workers=options.num_workers, device=device
    )
    has_bar = options.progress and rank() == 0
    batches = counted(loaded, "masked words", enabled=has_bar, total=len(local_batches))

    # Each batch has means over its masked words: [batches, kinds of images, loss and accuracy].
    prefixes = ["mlm_"]
    if len(images) > 1:
        prefixes.append("mlm_wrong_image_")
    means = torch.zeros(len(local_batches), len(prefixes), 2, dtype=torch.float64)
    num_words = torch.zeros(len(local_batches), dtype=torch.int64)
    for batch_index, (texts, image_batches) in enumerate(batches):
        num_words[batch_index] = texts.num_labels
        texts = texts.to(device)
        text = model.encode_text(texts.masked_input_ids, texts.attention_mask)
        for kind, image_batch in enumerate(image_batches):
            image_batch = images.on_device(image_batch, device)
            image = model.encode_image(image_batch.pixel_values, states=image_batch.image_states)
            fused = model.fuse(image, text, outputs="text")
            loss_and_accuracy = mlm_loss(model.mlm_logits, fused.text, texts.mlm_labels)
            means[batch_index, kind] = torch.stack(loss_and_accuracy).cpu()

    # The mean over the words of all batches of all processes.
    sums = means * num_words[:, None, None]
    _, sums, num_words = gather_by_id(local_batches, sums, num_words)
    total_words = max(1, int(num_words.sum()))
    per_word = sums.sum(dim=0) / total_words
    metrics = {}
    for prefix, (loss, accuracy) in zip(prefixes, per_word.tolist(), strict=True):
        metrics[f"{prefix}loss"] = loss
        metrics[f"{prefix}accuracy"] = accuracy
    return metrics


def other_image(image: int, row: int, num_images: int) -> int:
    """Draws another image of a set uniformly, by the row of the pair that it is shown with."""
    # In a circle, the other images begin after this one.
    offset = derive_seed("other image", row) % (num_images - 1)
    return (image + 1 + offset) % num_images
