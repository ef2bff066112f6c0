"""Masked words: does the model find them, and does it look at the image?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from bridgetower.data.batch import Batch, BatchKey, CaptionBatch, derive_seed, joined
from bridgetower.data.captions import CaptionImages, CaptionPairs
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

    What is hidden of a pair, and which other image it is shown with, depend on its number alone.
    """

    def __init__(self, images: CaptionImages, masking: MaskingConfig) -> None:
        self.pairs = CaptionPairs(images, masking, with_images=False)

    def __len__(self) -> int:
        return -(-len(self.pairs) // BATCH_SIZE)

    def __getitem__(self, number: int) -> tuple[CaptionBatch, list[Batch]]:
        """Returns the texts of a batch, and its images, then other ones if the set has any."""
        images = self.pairs.images
        rows = range(number * BATCH_SIZE, min((number + 1) * BATCH_SIZE, len(self.pairs)))
        pairs = [self.pairs[BatchKey((row,), derive_seed("masked words", row))] for row in rows]
        whole = [replace(pair, attention_mask=torch.ones_like(pair.mlm_labels)) for pair in pairs]
        own: list[int] = self.pairs.pairs[rows.start : rows.stop, 0].tolist()
        shown = [images.batch(own)]
        if len(images) > 1:
            shown.append(images.batch([other_image(*pair, len(images)) for pair in zip(own, rows, strict=True)]))
        return joined(whole, seed=0), shown


@torch.inference_mode()
def evaluate_masked_words(
    model: BridgeTower, images: CaptionImages, masking: MaskingConfig, options: EvaluationOptions = DEFAULTS
) -> dict[str, float]:
    """Returns loss and accuracy on hidden words with the right image and with another image of the set."""
    model.head("mlm")
    device, pairs = next(model.parameters()).device, MaskedPairs(images, masking)
    own = torch.arange(len(pairs))[rank() :: world_size()]
    loader: Iterable[tuple[CaptionBatch, list[Batch]]] = load_items(
        pairs.__getitem__, own.tolist(), num_workers=options.num_workers, device=device
    )
    kinds = ("", "wrong_image_") if len(images) > 1 else ("",)
    sums = torch.zeros(len(own), len(kinds), 2, dtype=torch.float64)
    words = torch.zeros(len(own), dtype=torch.int64)
    shown = counted(loader, "masked words", shown=options.progress and rank() == 0, total=len(own))
    for number, (batch, own_and_other) in enumerate(shown):
        moved, words[number] = batch.to(device), batch.num_labels
        text = model.encode_text(moved.masked_input_ids, moved.attention_mask)
        for kind, given in enumerate(own_and_other):
            on_device = images.on_device(given, device)
            image = model.encode_image(on_device.pixel_values, states=on_device.image_states)
            fused = model.fuse(image, text, outputs="text")
            sums[number, kind] = torch.stack(mlm_loss(model.mlm_logits, fused.text, moved.mlm_labels)).cpu()
    _, sums, words = gather_by_id(own, sums * words[:, None, None], words)
    per_word = (sums.sum(dim=0) / max(int(words.sum()), 1)).tolist()
    return {
        f"mlm_{kind}{name}": value
        for kind, row in zip(kinds, per_word, strict=True)
        for name, value in zip(("loss", "accuracy"), row, strict=True)
    }


def other_image(image: int, row: int, num_images: int) -> int:
    """Draws another image of a set, all others alike, by the number of the pair that it is shown with."""
    return (image + 1 + derive_seed("other image", row) % (num_images - 1)) % num_images
