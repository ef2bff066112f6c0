"""A contrastive loss over more pairs than are in memory at once, with its gradients kept per feature (GradCache)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridgetower.distributed import all_gather
from bridgetower.objectives.losses import info_nce


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
    """Compares all pairs of all parts and processes; returns what each part needs for its backward pass.

    Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (2021).
    """
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
