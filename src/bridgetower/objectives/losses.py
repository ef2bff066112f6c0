"""The paper's objectives as functions of features, logits and labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bridgetower.data.masking import IGNORED
from bridgetower.distributed import all_gather, rank
from bridgetower.model.layers import autocast


@dataclass(frozen=True)
class Losses:
    """Losses of one batch.

    Attributes:
        parts: Each objective's loss before its weight.
        total: The weighted sum that is minimised.
        metrics: Beside the losses, such as accuracies.
    """

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
    """Cross-entropy, and the accuracy."""
    return F.cross_entropy(logits.float(), labels), _accuracy(logits, labels)


def vqa_loss(
    logits: Float[Tensor, "b k"], targets: Float[Tensor, "b k"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean binary cross-entropy times the number of answers, and the mean score of the likeliest answers.

    Source: official `compute_vqa`, after Kim et al., "Bilinear Attention Networks" (2018).
    """
    loss = F.binary_cross_entropy_with_logits(logits.float(), targets) * targets.shape[1]
    scores = targets.gather(1, logits.argmax(dim=1, keepdim=True))
    return loss, scores.mean().detach()


DIRECTIONS = {2: ((0, 1), (1, 0)), 3: ((1, 0), (1, 2), (0, 2))}
"""Which embeddings choose among which, by how many each pair has: of its image, its text and of both fused.

Two: official `compute_itc`. Three: the loss of transformers' contrastive model.
"""


def itc_loss(
    embeds: Sequence[Float[Tensor, "b c"]],
    image_index: Int[Tensor, " b"],
    logit_scale: Float[Tensor, ""],
    *,
    gather_with_grads: bool = True,
    loss: Callable[..., Float[Tensor, ""]] | None = None,
) -> Float[Tensor, ""]:
    """InfoNCE of this rank's rows against the features of all ranks.

    Everything of the same image is a positive with equal weight; with one text per image these soft targets are the
    usual diagonal. Source: official `compute_itc` and, for soft targets, `compute_itm_itc`.
    """
    columns = [all_gather(each, gather_with_grads=gather_with_grads) for each in embeds]
    return (loss or info_nce)(embeds, image_index, columns, all_gather(image_index), logit_scale=logit_scale)


def info_nce(
    rows: Sequence[Float[Tensor, "r c"]],
    row_index: Int[Tensor, " r"],
    columns: Sequence[Float[Tensor, "s c"]],
    column_index: Int[Tensor, " s"],
    *,
    logit_scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Mean over pairs and `DIRECTIONS` of the contrastive loss of each pair against all columns."""
    positives = (row_index[:, None] == column_index[None]).float()
    targets = positives / positives.sum(dim=1, keepdim=True)
    losses = [
        F.cross_entropy(similarity(rows[one], columns[other], logit_scale), targets)
        for one, other in DIRECTIONS[len(rows)]
    ]
    return torch.stack(losses).mean()


def similarity(
    rows: Float[Tensor, "r c"], columns: Float[Tensor, "s c"], logit_scale: Float[Tensor, ""]
) -> Float[Tensor, "r s"]:
    """Scaled cosines in float32 under any autocast: bfloat16 has three digits, and these logits go up to 1000."""
    with autocast(rows.device, "fp32"):
        return logit_scale.float() * rows.float() @ columns.float().T


def own_columns(count: int) -> slice:
    """Columns of this rank's rows in a matrix whose columns are gathered from all ranks."""
    return slice(rank() * count, (rank() + 1) * count)


def _accuracy(logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    return (logits.argmax(dim=-1) == labels).float().mean().detach()
