"""Which images and texts are put together for image-text matching."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NO_NEGATIVES = (
    "a batch for matching needs at least two different images, with different captions; use a larger batch or more data"
)


@dataclass(frozen=True)
class Pairs:
    """Rows of images and of texts that form n pairs, and whether they match (1) or not (0)."""

    image_rows: Int[Tensor, " n"]
    text_rows: Int[Tensor, " n"]
    labels: Int[Tensor, " n"]


def random_pairs(image_index: Int[Tensor, " b"], generator: torch.Generator) -> Pairs:
    """Keeps the image of exactly b // 2 texts and gives every other text a random other image.

    Source: official `compute_itm` with `draw_false_image`; here the false image comes from the batch.

    Args:
        image_index: Equal numbers mark the same image, which is never a negative.
        generator: Source of all draws, on the CPU.

    Raises:
        ValueError: All images of the batch are the same.
    """
    count = len(image_index)
    labels = torch.zeros(count, dtype=torch.long)
    labels[torch.randperm(count, generator=generator)[: count // 2]] = 1
    labels = labels.to(image_index.device, non_blocking=True)
    rows = torch.arange(count, device=image_index.device)
    others = image_index[:, None] != image_index[None]
    negatives = _draw(torch.zeros_like(others, dtype=torch.float32), others, generator)
    return Pairs(torch.where(labels == 1, rows, negatives), rows, labels)


def uniform_pairs(image_index: Int[Tensor, " b"], generator: torch.Generator) -> Pairs:
    """Positives, then each text with another image, then each image with another text: 3b pairs, all as likely.

    Args:
        image_index: Equal numbers mark the same image, which is never a negative.
        generator: Source of all draws, on the CPU.

    Raises:
        ValueError: All images of the batch are the same.
    """
    others = image_index[:, None] != image_index[None]
    alike = torch.zeros_like(others, dtype=torch.float32)
    return pairs_with_negatives(
        _draw(alike, others, generator), _draw(alike, others, generator), slice(0, len(image_index))
    )


def hard_pairs(
    image_to_text: Float[Tensor, "b t"],
    text_to_image: Float[Tensor, "b i"],
    image_index: Int[Tensor, " b"],
    all_image_index: Int[Tensor, " t"],
    own_columns: slice,
    generator: torch.Generator,
) -> Pairs:
    """Positives, then each text with a hard image, then each image with a hard text: 3b pairs.

    Negatives are drawn from the softmax of the contrastive similarity, as in ALBEF. An image's own texts and a text's
    own image are left out. Official: they get weight 0 after the softmax and are drawn where it underflows; here: the
    softmax is over the others only, which is the same distribution without the underflow.

    Args:
        image_to_text: Scaled similarities of this rank's images to the candidate texts.
        text_to_image: Scaled similarities of this rank's texts to the candidate images.
        image_index: Of this rank's pairs.
        all_image_index: Of the candidates.
        own_columns: Where this rank's pairs stand among the candidates.
        generator: Source of all draws, on the CPU.

    Raises:
        ValueError: All candidates are the same image.
    """
    others = image_index[:, None] != all_image_index[None]
    return pairs_with_negatives(
        _draw(text_to_image, others, generator),
        _draw(image_to_text, others, generator),
        own_columns,
    )


def pairs_with_negatives(
    negative_images: Int[Tensor, " b"], negative_texts: Int[Tensor, " b"], own_columns: slice
) -> Pairs:
    """Lays out positives, (negative image, text) and (image, negative text) as in the official code."""
    count = len(negative_images)
    own = torch.arange(own_columns.start, own_columns.stop, device=negative_images.device)
    labels = torch.zeros(3 * count, dtype=torch.long, device=negative_images.device)
    labels[:count] = 1
    return Pairs(torch.cat([own, negative_images, own]), torch.cat([own, own, negative_texts]), labels)


def _draw(logits: Float[Tensor, "b n"], allowed: Bool[Tensor, "b n"], generator: torch.Generator) -> Int[Tensor, " b"]:
    """Draws one column per row from the softmax over the allowed ones, as `torch.multinomial` does on a CPU.

    The numbers are drawn on the CPU and compared on the device, which is not waited for.
    """
    if allowed.device.type == "cpu" and not bool(allowed.any(dim=1).all()):
        raise ValueError(NO_NEGATIVES)
    # Features that are not finite must not end here: the loss that follows from them names the batch.
    finite = logits.detach().float().nan_to_num()
    weights = finite.masked_fill(~allowed, -torch.inf).softmax(dim=1)
    draws = torch.empty(weights.shape).exponential_(generator=generator)
    return (weights / draws.to(weights.device, non_blocking=True)).argmax(dim=1)
