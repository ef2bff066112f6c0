"""The paper's objectives as functions of features, logits and labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bridgetower.data.batch import IGNORED
from bridgetower.distributed import all_gather
from bridgetower.model.layers import autocast


@dataclass(frozen=True)
class Losses:
    """Losses of one batch: of each objective before its weight, the weighted sum, and metrics such as accuracies."""

    parts: dict[str, Float[Tensor, ""]]
    total: Float[Tensor, ""]
    metrics: dict[str, Float[Tensor, ""]] = field(default_factory=dict)

    @classmethod
    def weigh(
        cls,
        parts: dict[str, Float[Tensor, ""]],
        weights: Mapping[str, float],
        metrics: dict[str, Float[Tensor, ""]] | None = None,
    ) -> Losses:
        """Sums `parts` under `weights`, which name every part."""
        if not parts:
            raise ValueError("no objective is active: every loss weight is 0; give at least one a positive weight")
        total = torch.stack([weights[name] * loss for name, loss in parts.items()]).sum()
        return cls(parts, total, metrics or {})


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
