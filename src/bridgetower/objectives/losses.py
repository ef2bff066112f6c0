"""The paper's objectives as functions of features, logits and labels, and the pairs of the matching loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridgetower.data.batches.batch import IGNORED
from bridgetower.distributed import all_gather
from bridgetower.model.layers import autocast, to_device

Scalar = Float[Tensor, ""]
ImageIndex = Int[Tensor, " b"]
"""A number for the image of each pair, equal for the same image, across ranks."""

_warn_once = cache(logging.getLogger(__name__).warning)


@dataclass(frozen=True)
class Losses:
    """Losses of a batch."""

    terms: dict[str, Scalar]  # of each objective, before its weight
    total: Scalar  # weighted sum
    metrics: dict[str, Scalar] = field(default_factory=dict)  # such as accuracies

    @classmethod
    def weigh(
        cls,
        terms: dict[str, Tensor],
        weights: Mapping[str, float],
        metrics: dict[str, Tensor] | None = None,
    ) -> Losses:
        """Sums the terms under weights, which name each of them."""
        weighted = [weights[name] * loss for name, loss in terms.items()]
        return cls(terms, torch.stack(weighted).sum(), metrics or {})


def mlm_loss(
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "b m d"],
    labels: Int[Tensor, "b l"],
    positions: Int[Tensor, " n"] | None = None,
) -> tuple[Scalar, Scalar]:
    """Mean cross-entropy and accuracy over labelled positions. Logits are computed there only."""
    if positions is None:
        positions = (labels != IGNORED).flatten().nonzero()[:, 0]
    targets = labels.flatten()[positions]
    tokens = hidden[:, : labels.shape[1]].flatten(0, 1)
    if len(targets) == 0:
        # All processes need gradients of the same parameters.
        loss = head(tokens[:1]).float().sum() * 0.0
        return loss, hidden.new_zeros(())
    logits = head(tokens[positions])
    return F.cross_entropy(logits.float(), targets), _accuracy(logits, targets)


def class_loss(logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> tuple[Scalar, Scalar]:
    return F.cross_entropy(logits.float(), labels), _accuracy(logits, labels)


DIRECTIONS = {2: ((0, 1), (1, 0)), 3: ((1, 0), (1, 2), (0, 2))}
"""(query, key) indices of the embeddings that the contrastive loss compares, by the number of embeddings of a pair.

Embeddings are of the image, of the text, and of both fused. Two: official `compute_itc`. Three: the loss of
transformers' contrastive model.
"""


def info_nce(
    rows: Sequence[Float[Tensor, "r c"]],
    row_index: Int[Tensor, " r"],
    columns: Sequence[Float[Tensor, "s c"]],
    column_index: Int[Tensor, " s"],
    *,
    logit_scale: Scalar,
) -> Scalar:
    """Mean over pairs and `DIRECTIONS` of the contrastive loss of each pair against all columns.

    All columns of the same image are positives with equal weight. With one text per image these soft targets are the
    usual diagonal. Source: official `compute_itc` and, for soft targets, `compute_itm_itc`.
    """
    positives = (row_index[:, None] == column_index[None]).float()
    targets = positives / positives.sum(dim=1, keepdim=True)
    losses = []
    for query, key in DIRECTIONS[len(rows)]:
        logits = similarity(rows[query], columns[key], logit_scale)
        losses.append(F.cross_entropy(logits, targets))
    return torch.stack(losses).mean()


def itc_loss(
    embeds: Sequence[Float[Tensor, "b c"]],
    image_index: ImageIndex,
    logit_scale: Scalar,
    *,
    gather_with_grads: bool = True,
    loss: Callable[..., Scalar] = info_nce,
) -> Scalar:
    """Contrastive loss of this rank's rows against the features of all ranks."""
    columns = [all_gather(local, gather_with_grads=gather_with_grads) for local in embeds]
    return loss(embeds, image_index, columns, all_gather(image_index), logit_scale=logit_scale)


def similarity(
    rows: Float[Tensor, "r c"], columns: Float[Tensor, "s c"], logit_scale: Scalar
) -> Float[Tensor, "r s"]:
    """Scaled cosines in float32 under any autocast: bfloat16 has three digits, and these logits go up to 1000."""
    with autocast(rows.device, "fp32"):
        return logit_scale.float() * rows.float() @ columns.float().T


def _accuracy(logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> Scalar:
    return (logits.argmax(dim=-1) == labels).float().mean().detach()


@dataclass(frozen=True)
class Features:
    """Inputs of the contrastive loss."""

    embeds: tuple[Float[Tensor, "b c"], ...]  # of images, texts and perhaps of both fused
    image_index: ImageIndex


@dataclass(frozen=True)
class Contrast:
    """The loss of a step, with its gradients for the embeddings of one micro-batch and for the scale."""

    loss: Scalar
    embeds: tuple[Float[Tensor, "b c"], ...]
    logit_scale: Scalar
    num_micro_batches: int

    def through(self, embeds: Sequence[Float[Tensor, "b c"]], logit_scale: Scalar) -> Scalar:
        """Returns a loss that gives these features the right gradients in a mean over all micro-batches."""
        products = []
        for gradient, features in zip(self.embeds, embeds, strict=True):
            products.append((gradient * features).sum())
        total = self.num_micro_batches * torch.stack(products).sum()
        linear = total + self.logit_scale * logit_scale
        # In this order the value is that of the loss to the bit.
        return linear - linear.detach() + self.loss


def contrast_micro_batches(
    micro_batches: Sequence[Features],
    logit_scale: Scalar,
    *,
    gather_with_grads: bool = True,
    loss: Callable[..., Scalar] = info_nce,
) -> list[Contrast]:
    """Returns the gradients of each micro-batch for the pairs of all of them and of all processes (Gao et al. 2021)."""
    scale = logit_scale.detach().requires_grad_()
    sizes = [len(micro_batch.image_index) for micro_batch in micro_batches]

    # The embeddings of all micro-batches and processes are columns.
    embeds_by_kind = zip(*(micro_batch.embeds for micro_batch in micro_batches), strict=True)
    local_columns = [_leaf(torch.cat(embeds)) for embeds in embeds_by_kind]
    with torch.enable_grad():
        gathered = [
            all_gather(local, gather_with_grads=gather_with_grads) for local in local_columns
        ]
    columns = [_leaf(embeds) for embeds in gathered]
    column_index = all_gather(torch.cat([micro_batch.image_index for micro_batch in micro_batches]))

    # The embeddings of a micro-batch are rows. Only the similarities of one are in memory.
    rows_of_micro_batches = []
    total = torch.zeros_like(logit_scale)
    for micro_batch, size in zip(micro_batches, sizes, strict=True):
        rows = [_leaf(embeds) for embeds in micro_batch.embeds]
        rows_of_micro_batches.append(rows)
        with torch.enable_grad():
            mean = loss(rows, micro_batch.image_index, columns, column_index, logit_scale=scale)
            share = mean * (size / sum(sizes))
        share.backward()
        total = total + share.detach()

    # An embedding has gradients as a row and as a column.
    gradients_of_columns = [_gradient(embeds) for embeds in columns]
    local_gradients = torch.autograd.grad(gathered, local_columns, gradients_of_columns)
    split_gradients = [gradient.split(sizes) for gradient in local_gradients]
    contrasts = []
    for rows, *gradients in zip(rows_of_micro_batches, *split_gradients, strict=True):
        summed = []
        for row, gradient in zip(rows, gradients, strict=True):
            summed.append(_gradient(row) + gradient)
        contrasts.append(Contrast(total, tuple(summed), _gradient(scale), len(micro_batches)))
    return contrasts


def _leaf(embeds: Tensor) -> Tensor:
    return embeds.detach().clone().requires_grad_()


def _gradient(leaf: Tensor) -> Tensor:
    # Texts among three embeddings are no keys.
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


class Pairs(NamedTuple):
    """Pairs of the matching loss."""

    image_rows: Int[Tensor, " n"]
    text_rows: Int[Tensor, " n"]
    labels: Int[Tensor, " n"]  # 1: they match; 0: they do not


def random_pairs(image_index: ImageIndex, generator: torch.Generator) -> Pairs:
    """Keeps the image of exactly b // 2 texts and gives every other text a random other image.

    Source: official `compute_itm` with `draw_false_image`. Here the false image comes from the batch.
    """
    count = len(image_index)
    labels = torch.zeros(count, dtype=torch.long)
    order = torch.randperm(count, generator=generator)
    labels[order[: count // 2]] = 1
    labels = to_device(labels, image_index.device)
    texts = torch.arange(count, device=image_index.device)
    is_other_image = image_index[:, None] != image_index[None]
    uniform_logits = torch.zeros_like(is_other_image, dtype=torch.float32)
    negative_images = _draw(uniform_logits, is_other_image, generator)
    images = torch.where(labels == 1, texts, negative_images)
    is_match = image_index[images] == image_index
    return Pairs(images, texts, is_match.long())


def uniform_pairs(image_index: ImageIndex, generator: torch.Generator) -> Pairs:
    """Positives, then each text with another image, then each image with another text: 3b pairs, drawn uniformly."""
    count = len(image_index)
    equal = torch.zeros(count, count, device=image_index.device)
    return hard_pairs(equal, equal, image_index, image_index, slice(0, count), generator)


def hard_pairs(
    image_to_text: Float[Tensor, "b t"],
    text_to_image: Float[Tensor, "b i"],
    image_index: ImageIndex,
    all_image_index: Int[Tensor, " t"],
    local_columns: slice,
    generator: torch.Generator,
) -> Pairs:
    """Positives, then each text with a hard image, then each image with a hard text: 3b pairs, as in the official code.

    Negatives are drawn from the softmax of the contrastive similarity, as in ALBEF, over pairs that do not match. In
    the official code matching pairs get weight 0 after the softmax, and are drawn where it underflows.
    """
    is_negative = image_index[:, None] != all_image_index[None]
    negative_images = _draw(text_to_image, is_negative, generator)
    negative_texts = _draw(image_to_text, is_negative, generator)
    images, texts, _ = pairs_with_negatives(negative_images, negative_texts, local_columns)
    # Where no negative could be drawn, the first column may match.
    is_match = all_image_index[images] == all_image_index[texts]
    return Pairs(images, texts, is_match.long())


def pairs_with_negatives(
    negative_images: Int[Tensor, " b"], negative_texts: Int[Tensor, " b"], local_columns: slice
) -> Pairs:
    """Lays out positives, (negative image, text) and (image, negative text) as in the official code."""
    count = len(negative_images)
    device = negative_images.device
    positives = torch.arange(local_columns.start, local_columns.stop, device=device)
    images = torch.cat([positives, negative_images, positives])
    texts = torch.cat([positives, positives, negative_texts])
    labels = (torch.arange(3 * count, device=device) < count).long()
    return Pairs(images, texts, labels)


def matching_loss(logits: Float[Tensor, "n 2"], labels: Int[Tensor, " n"]) -> tuple[Scalar, Scalar]:
    """Cross-entropy and accuracy. Without negatives the loss is 0: it would teach to accept every pair."""
    loss, accuracy = class_loss(logits, labels)
    has_negatives = (labels == 0).any()
    # On a GPU the condition would wait for it.
    if labels.device.type == "cpu" and not has_negatives:
        _warn_once(
            "all images of a micro-batch are the same, so that matching (ITM) has no negatives and is left out of it; "
            "if this is frequent, raise micro_batch_size or use more data"
        )
    return loss * has_negatives, accuracy


def _draw(
    logits: Float[Tensor, "b n"], allowed: Bool[Tensor, "b n"], generator: torch.Generator
) -> Int[Tensor, " b"]:
    """Draws an allowed column per row from the softmax, as `torch.multinomial` does. Without any it is the first."""
    # The loss of NaN features is NaN, and its error names the batch.
    finite = logits.detach().float().nan_to_num()
    logits_of_allowed = finite.masked_fill(~allowed, -torch.inf)
    weights = logits_of_allowed.softmax(dim=1).nan_to_num()
    draws = torch.empty(weights.shape).exponential_(generator=generator)
    return (weights / to_device(draws, weights.device)).argmax(dim=1)
