"""Which images and texts are put together for image-text matching."""

from __future__ import annotations

import logging
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridgetower.objectives.losses import class_loss

_warn_once = cache(logging.getLogger(__name__).warning)


class Pairs(NamedTuple):
    """Rows of images and of texts that form n pairs, and whether they match (1) or not (0)."""

    image_rows: Int[Tensor, " n"]
    text_rows: Int[Tensor, " n"]
    labels: Int[Tensor, " n"]


def random_pairs(image_index: Int[Tensor, " b"], generator: torch.Generator) -> Pairs:
    """Keeps the image of exactly b // 2 texts and gives every other text a random other image.

    Source: official `compute_itm` with `draw_false_image`; here the false image comes from the batch.
    """
    count = len(image_index)
    labels = torch.zeros(count, dtype=torch.long)
    labels[torch.randperm(count, generator=generator)[: count // 2]] = 1
    labels = labels.to(image_index.device, non_blocking=True)
    rows = torch.arange(count, device=image_index.device)
    others = image_index[:, None] != image_index[None]
    negatives = _draw(torch.zeros_like(others, dtype=torch.float32), others, generator)
    images = torch.where(labels == 1, rows, negatives)
    return Pairs(images, rows, (image_index[images] == image_index).long())


def uniform_pairs(image_index: Int[Tensor, " b"], generator: torch.Generator) -> Pairs:
    """Positives, then each text with another image, then each image with another text: 3b pairs, all as likely."""
    alike = torch.zeros(2 * image_index.shape, device=image_index.device)
    return hard_pairs(alike, alike, image_index, image_index, slice(0, len(image_index)), generator)


def hard_pairs(
    image_to_text: Float[Tensor, "b t"],
    text_to_image: Float[Tensor, "b i"],
    image_index: Int[Tensor, " b"],
    all_image_index: Int[Tensor, " t"],
    own_columns: slice,
    generator: torch.Generator,
) -> Pairs:
    """Positives, then each text with a hard image, then each image with a hard text: 3b pairs, as in the official code.

    Negatives are drawn from the softmax of the contrastive similarity, as in ALBEF. An image's own texts and a text's
    own image are left out. Official: they get weight 0 after the softmax and are drawn where it underflows; here: the
    softmax is over the others only, which is the same distribution without the underflow.
    """
    others = image_index[:, None] != all_image_index[None]
    draws = _draw(text_to_image, others, generator), _draw(image_to_text, others, generator)
    images, texts, _ = pairs_with_negatives(*draws, own_columns)
    # Pairs are of one image where nothing else could be drawn.
    return Pairs(images, texts, (all_image_index[images] == all_image_index[texts]).long())


def pairs_with_negatives(
    negative_images: Int[Tensor, " b"], negative_texts: Int[Tensor, " b"], own_columns: slice
) -> Pairs:
    """Lays out positives, (negative image, text) and (image, negative text) as in the official code."""
    count, device = len(negative_images), negative_images.device
    own = torch.arange(own_columns.start, own_columns.stop, device=device)
    labels = (torch.arange(3 * count, device=device) < count).long()
    return Pairs(torch.cat([own, negative_images, own]), torch.cat([own, own, negative_texts]), labels)


def matching_loss(
    logits: Float[Tensor, "n 2"], labels: Int[Tensor, " n"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Cross-entropy and accuracy; the loss is 0 where nothing is a negative, which would teach to say yes to all."""
    loss, accuracy = class_loss(logits, labels)
    has_negatives = (labels == 0).any()
    if labels.device.type == "cpu" and not has_negatives:  # a GPU is not waited for
        _warn_once(
            "all images of a micro-batch are the same, so that matching (ITM) has no negatives and is left out of it; "
            "if this is frequent, raise micro_batch_size or use more data"
        )
    return loss * has_negatives, accuracy


def _draw(logits: Float[Tensor, "b n"], allowed: Bool[Tensor, "b n"], generator: torch.Generator) -> Int[Tensor, " b"]:
    """Draws one column per row from the softmax over the allowed ones, as `torch.multinomial` does on a CPU.

    The numbers are drawn on the CPU and compared on the device, which is not waited for. Rows without an allowed column
    get the first one.
    """
    # Features that are not finite must not end here: the loss that follows from them names the batch.
    finite = logits.detach().float().nan_to_num()
    weights = finite.masked_fill(~allowed, -torch.inf).softmax(dim=1).nan_to_num()
    draws = torch.empty(weights.shape).exponential_(generator=generator)
    return (weights / draws.to(weights.device, non_blocking=True)).argmax(dim=1)
