"""A contrastive loss over more pairs than are in memory at once, with its gradients kept per feature (GradCache)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridgetower.tasks.losses import itc_loss


# Not frozen: Fabric copies what goes into a wrapped module, and refuses frozen dataclasses.
@dataclass
class Features:
    """What the contrastive loss reads of some pairs.

    Attributes:
        image_embeds, text_embeds: L2-normalised.
        image_index: Equal numbers mark the same image, across ranks.
    """

    image_embeds: Float[Tensor, "b c"]
    text_embeds: Float[Tensor, "b c"]
    image_index: Int[Tensor, " b"]


@dataclass
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
        """Returns the loss such that the mean over all parts sends the right gradients through these features.

        Args:
            image_embeds, text_embeds: The features of this part, computed again with a graph.
            logit_scale: 1 / temperature, likewise.
        """
        linear = (self.image_embeds * image_embeds).sum() + (self.text_embeds * text_embeds).sum()
        linear = self.num_parts * linear + self.logit_scale * logit_scale
        return self.loss + linear - linear.detach()


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
    images = torch.cat([part.image_embeds for part in parts]).detach().requires_grad_()
    texts = torch.cat([part.text_embeds for part in parts]).detach().requires_grad_()
    index, scale = torch.cat([part.image_index for part in parts]), logit_scale.detach().requires_grad_()
    with torch.enable_grad():
        loss = itc_loss(images, texts, index, scale, gather_with_grads=gather_with_grads)
        for_images, for_texts, for_scale = torch.autograd.grad(loss, [images, texts, scale])
    lengths = [len(part.image_index) for part in parts]
    return [
        Contrast(loss.detach(), image, text, for_scale, len(parts))
        for image, text in zip(for_images.split(lengths), for_texts.split(lengths), strict=True)
    ]
