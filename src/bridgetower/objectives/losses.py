"""The paper's objectives as functions of features, logits and labels, and the pairs that matching is learnt from."""

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

from bridgetower.data.batch import IGNORED
from bridgetower.distributed import all_gather
from bridgetower.model.layers import autocast, to_device

_warn_once = cache(logging.getLogger(__name__).warning)


@dataclass(frozen=True)
class Losses:
    """Losses of one batch: of each objective before its weight, the weighted sum, and metrics such as accuracies."""

    parts: dict[str, Float[Tensor, ""]]
    total: Float[Tensor, ""]
    metrics: dict[str, Float[Tensor, ""]] = field(default_factory=dict)

    @classmethod
    def weigh(
        cls, parts: dict[str, Tensor], weights: Mapping[str, float], metrics: dict[str, Tensor] | None = None
    ) -> Losses:
        """Sums `parts` under `weights`, which name every part."""
        return cls(parts, torch.stack([weights[name] * loss for name, loss in parts.items()]).sum(), metrics or {})


def mlm_loss(
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "b m d"],
    labels: Int[Tensor, "b l"],
    positions: Int[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean cross-entropy over labelled positions; logits are computed there only."""
    if positions is None:
        positions = (labels != IGNORED).flatten().nonzero()[:, 0]
    targets, tokens = labels.flatten()[positions], hidden[:, : labels.shape[1]].flatten(0, 1)
    if len(targets) == 0:  # the head is run all the same, so that processes have gradients of the same parameters
        return head(tokens[:1]).float().sum() * 0.0, hidden.new_zeros(())
    logits = head(tokens[positions])
    return F.cross_entropy(logits.float(), targets), _accuracy(logits, targets)


def class_loss(logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    return F.cross_entropy(logits.float(), labels), _accuracy(logits, labels)


DIRECTIONS = {2: ((0, 1), (1, 0)), 3: ((1, 0), (1, 2), (0, 2))}
"""Which embeddings choose among which, by how many each pair has: of its image, its text and of both fused.

Two: official `compute_itc`. Three: the loss of transformers' contrastive model.
"""


def info_nce(
    rows: Sequence[Float[Tensor, "r c"]],
    row_index: Int[Tensor, " r"],
    columns: Sequence[Float[Tensor, "s c"]],
    column_index: Int[Tensor, " s"],
    *,
    logit_scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Mean over pairs and `DIRECTIONS` of the contrastive loss of each pair against all columns.

    Everything of the same image is a positive with equal weight; with one text per image these soft targets are the
    usual diagonal. Source: official `compute_itc` and, for soft targets, `compute_itm_itc`.
    """
    positives = (row_index[:, None] == column_index[None]).float()
    targets = positives / positives.sum(dim=1, keepdim=True)
    losses = [
        F.cross_entropy(similarity(rows[one], columns[other], logit_scale), targets)
        for one, other in DIRECTIONS[len(rows)]
    ]
    return torch.stack(losses).mean()


def itc_loss(
    embeds: Sequence[Float[Tensor, "b c"]],
    image_index: Int[Tensor, " b"],
    logit_scale: Float[Tensor, ""],
    *,
    gather_with_grads: bool = True,
    loss: Callable[..., Float[Tensor, ""]] = info_nce,
) -> Float[Tensor, ""]:
    """Contrastive loss of this rank's rows against the features of all ranks."""
    columns = [all_gather(each, gather_with_grads=gather_with_grads) for each in embeds]
    return loss(embeds, image_index, columns, all_gather(image_index), logit_scale=logit_scale)


def similarity(
    rows: Float[Tensor, "r c"], columns: Float[Tensor, "s c"], logit_scale: Float[Tensor, ""]
) -> Float[Tensor, "r s"]:
    """Scaled cosines in float32 under any autocast: bfloat16 has three digits, and these logits go up to 1000."""
    with autocast(rows.device, "fp32"):
        return logit_scale.float() * rows.float() @ columns.float().T


def _accuracy(logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    return (logits.argmax(dim=-1) == labels).float().mean().detach()


@dataclass(frozen=True)
class Features:
    """What the contrastive loss reads of some pairs; equal numbers mark the same image, across ranks."""

    embeds: tuple[Float[Tensor, "b c"], ...]
    image_index: Int[Tensor, " b"]


@dataclass(frozen=True)
class Contrast:
    """The loss of all parts of a batch, with its gradients for the embeddings of one of them and for the scale."""

    loss: Float[Tensor, ""]
    embeds: tuple[Float[Tensor, "b c"], ...]
    logit_scale: Float[Tensor, ""]
    num_parts: int

    def through(self, embeds: Sequence[Float[Tensor, "b c"]], logit_scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Returns the loss such that the mean over all parts gives these features the right gradients."""
        products = [(gradient * each).sum() for gradient, each in zip(self.embeds, embeds, strict=True)]
        linear = self.num_parts * torch.stack(products).sum() + self.logit_scale * logit_scale
        return linear - linear.detach() + self.loss  # in this order the value is that of the loss to the bit


def contrast_parts(
    parts: Sequence[Features],
    logit_scale: Float[Tensor, ""],
    *,
    gather_with_grads: bool = True,
    loss: Callable[..., Float[Tensor, ""]] = info_nce,
) -> list[Contrast]:
    """Compares the pairs of all parts and processes; gives what each needs for its backward pass (Gao et al. 2021)."""
    scale, lengths = logit_scale.detach().requires_grad_(), [len(part.image_index) for part in parts]
    own = [_leaf(torch.cat(embeds)) for embeds in zip(*(part.embeds for part in parts), strict=True)]
    with torch.enable_grad():
        gathered = [all_gather(embeds, gather_with_grads=gather_with_grads) for embeds in own]
    columns, index = [_leaf(embeds) for embeds in gathered], all_gather(torch.cat([part.image_index for part in parts]))
    rows = [[_leaf(embeds) for embeds in part.embeds] for part in parts]
    total = torch.zeros_like(logit_scale)
    for part, leaves in zip(parts, rows, strict=True):  # the similarities of one part at a time
        with torch.enable_grad():
            mean = loss(leaves, part.image_index, columns, index, logit_scale=scale)
            share = mean * (len(part.image_index) / sum(lengths))
        share.backward()
        total = total + share.detach()
    as_columns = torch.autograd.grad(gathered, own, [_gradient(embeds) for embeds in columns])
    more = zip(*(embeds.split(lengths) for embeds in as_columns), strict=True)
    return [
        Contrast(
            total,
            tuple(_gradient(leaf) + added for leaf, added in zip(leaves, others, strict=True)),
            _gradient(scale),
            len(parts),
        )
        for leaves, others in zip(rows, more, strict=True)
    ]


def _leaf(embeds: Tensor) -> Tensor:
    return embeds.detach().clone().requires_grad_()


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad  # texts of three embeddings are no columns


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
    labels = to_device(labels, image_index.device)
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

    Negatives are drawn from the softmax of the contrastive similarity, as in ALBEF, over the others only: officially
    own pairs get weight 0 after the softmax, and are drawn where it underflows.
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
    """Draws a column per row from the softmax over the allowed, as `torch.multinomial` does; the first if none is."""
    # Features that are not finite must not end here: the loss that follows from them names the batch.
    finite = logits.detach().float().nan_to_num()
    weights = finite.masked_fill(~allowed, -torch.inf).softmax(dim=1).nan_to_num()
    draws = torch.empty(weights.shape).exponential_(generator=generator)
    return (weights / to_device(draws, weights.device)).argmax(dim=1)
