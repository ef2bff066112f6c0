"""A contrastive loss over more pairs than are in memory at once, with its gradients kept per feature (GradCache)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridgetower.distributed import all_gather
from bridgetower.objectives.losses import info_nce


@dataclass(frozen=True)
class Features:
    """What the contrastive loss reads of some pairs.

    Attributes:
        image_embeds, text_embeds: L2-normalised.
        image_index: Equal numbers mark the same image, across ranks.
    """

    image_embeds: Float[Tensor, "b c"]
    text_embeds: Float[Tensor, "b c"]
    image_index: Int[Tensor, " b"]


@dataclass(frozen=True)
class Contrast:
    """The loss of all parts of a batch, with the gradients that belong to one of them.

    Attributes:
        loss: Over all parts.
        image_embeds, text_embeds: Gradients of the loss for the features of this part.
        logit_scale: Gradient of the loss for the scale.
        num_parts: Of the batch.
    """

    loss: Float[Tensor, ""]
    image_embeds: Float[Tensor, "b c"]
    text_embeds: Float[Tensor, "b c"]
    logit_scale: Float[Tensor, ""]
    num_parts: int

    def through(
        self, image_embeds: Float[Tensor, "b c"], text_embeds: Float[Tensor, "b c"], logit_scale: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """Returns the loss such that the mean over all parts gives these features the right gradients.

        Args:
            image_embeds, text_embeds: The features of this part, computed again with a graph.
            logit_scale: 1 / temperature, likewise.
        """
        linear = (self.image_embeds * image_embeds).sum() + (self.text_embeds * text_embeds).sum()
        linear = self.num_parts * linear + self.logit_scale * logit_scale
        return linear - linear.detach() + self.loss  # in this order the value is that of the loss to the bit


def contrast_parts(
    parts: Sequence[Features], logit_scale: Float[Tensor, ""], *, gather_with_grads: bool = True
) -> list[Contrast]:
    """Compares all pairs of all parts and processes; returns what each part needs for its backward pass.

    Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (2021).

    Args:
        parts: Features without a graph; every process has as many pairs.
        logit_scale: 1 / temperature.
        gather_with_grads: Let gradients flow to the features of other ranks.
    """
    scale, lengths = logit_scale.detach().requires_grad_(), [len(part.image_index) for part in parts]
    own = [_leaf(torch.cat(embeds)) for embeds in zip(*((p.image_embeds, p.text_embeds) for p in parts), strict=True)]
    with torch.enable_grad():
        gathered = [all_gather(embeds, gather_with_grads=gather_with_grads) for embeds in own]
    columns, index = [_leaf(embeds) for embeds in gathered], all_gather(torch.cat([part.image_index for part in parts]))
    rows = [(_leaf(part.image_embeds), _leaf(part.text_embeds)) for part in parts]
    loss = torch.zeros_like(logit_scale)
    for part, leaves in zip(parts, rows, strict=True):  # the similarities of one part at a time
        with torch.enable_grad():
            mean = info_nce(leaves, part.image_index, (columns[0], columns[1]), index, logit_scale=scale)
            share = mean * (len(part.image_index) / sum(lengths))
        share.backward()
        loss = loss + share.detach()
    as_columns = torch.autograd.grad(gathered, own, [_gradient(embeds) for embeds in columns])
    return [
        Contrast(loss, _gradient(image) + more_image, _gradient(text) + more_text, _gradient(scale), len(parts))
        for (image, text), more_image, more_text in zip(rows, *(e.split(lengths) for e in as_columns), strict=True)
    ]


def _leaf(embeds: Tensor) -> Tensor:
    return embeds.detach().clone().requires_grad_()


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
