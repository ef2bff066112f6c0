"""Momentum distillation as in ALBEF (Li et al. 2021): a copy that follows the weights slowly gives soft targets.

ITC and MLM choose among (1 - alpha) · the truth + alpha · what the copy would choose:

bridgetower train RECIPE --extensions examples/momentum.py:MOMENTUM --task.phases.0.itc 0 --task.phases.0.mlm 0
    --task.phases.0.objectives momentum_itc 1 momentum_mlm 1 …

There is no queue of features: pairs are compared with those of the micro-batch, of all processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bridgetower import Extensions
from bridgetower.data.batches.batch import IGNORED, CaptionBatch
from bridgetower.model.fusion import Encoded
from bridgetower.objectives.losses import itc_loss, similarity
from bridgetower.objectives.pretraining import Objective, PretrainingTask, Step
from bridgetower.training.setup import Callback, TrainContext


class Momentum(Callback):
    """The copy is `model.teacher`: states of the run have it, checkpoints do not."""

    def __init__(self, alpha: float = 0.4, momentum: float = 0.995, ramp: float = 0.05) -> None:
        """Alpha rises to its value over the first `ramp` of the run."""
        self.alpha, self.momentum, self.ramp = alpha, momentum, ramp
        self.encoded: tuple[CaptionBatch, Encoded] | None = None

    def prepare(self, context: TrainContext) -> None:
        """Adds the copy."""
        model = context.model
        model.add_module(
            "teacher",
            deepcopy(model, {id(model.extensions): model.extensions}).requires_grad_(False),
        )

    @torch.no_grad()
    def after_step(
        self, context: TrainContext, optimizer: torch.optim.Optimizer, step: int
    ) -> None:
        """Moves the copy."""
        weights = dict(context.model.named_parameters())
        for name, copied in context.model.get_submodule("teacher").named_parameters():
            copied.lerp_(weights[name], 1 - self.momentum)

    def exported(self, context: TrainContext, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leaves the copy out."""
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("teacher.")}

    def itc(self, task: PretrainingTask, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Compares images with texts, as `itc` does."""
        model, teacher, batch = task.model, self.teacher(task), step.batch
        with torch.no_grad():
            text = teacher.encode_text(
                batch.input_ids, batch.attention_mask, outputs="cls", states=batch.text_states
            )
            soft = teacher.image_embeds(self.image(teacher, batch)), teacher.text_embeds(text)
        embeds = (model.image_embeds(step.image), model.text_embeds(step.texts["plain"]), *soft)
        loss = partial(distilled, alpha=self.share(task))
        return itc_loss(embeds, batch.image_index, model.head("itc").logit_scale(), loss=loss), {}

    def mlm(self, task: PretrainingTask, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Finds hidden words, as `mlm` does with `mlm_normalization="official"`."""
        model, teacher, batch = task.model, self.teacher(task), step.batch
        hidden = batch.mlm_labels != IGNORED
        labels = batch.mlm_labels[hidden]
        read = model.fuse(step.image, step.texts["masked"], "text").text[:, : hidden.shape[1]][
            hidden
        ]
        logits = model.mlm_logits(read).float()
        with torch.no_grad():
            masked = teacher.encode_text(
                batch.masked_input_ids, batch.attention_mask, states=batch.masked_states
            )
            read = teacher.fuse(self.image(teacher, batch), masked, "text").text[
                :, : hidden.shape[1]
            ][hidden]
            truth = F.one_hot(labels, logits.shape[1]).float()
            targets = truth.lerp(teacher.mlm_logits(read).float().softmax(dim=-1), self.share(task))
        count = hidden.sum().clamp(min=1)
        accuracy = (logits.argmax(dim=-1) == labels).sum() / count
        return F.cross_entropy(logits, targets, reduction="sum") / count, {"mlm_accuracy": accuracy}

    def share(self, task: PretrainingTask) -> float:
        """Alpha at this step."""
        return self.alpha * min(1.0, task.progress / self.ramp if self.ramp else 1.0)

    def teacher(self, task: PretrainingTask) -> Any:
        """The copy, without dropout."""
        return task.model.get_submodule("teacher").eval()

    def image(self, teacher: Any, batch: CaptionBatch) -> Encoded:
        """The copy's encoding of the images, which both objectives read."""
        if self.encoded is None or self.encoded[0] is not batch:
            self.encoded = (
                batch,
                teacher.encode_image(batch.pixel_values, states=batch.image_states),
            )
        return self.encoded[1]


def distilled(
    rows: Sequence[Tensor],
    row_index: Tensor,
    columns: Sequence[Tensor],
    column_index: Tensor,
    *,
    logit_scale: Tensor,
    alpha: float,
) -> Tensor:
    """Contrastive loss of images and texts, of which 2 and 3 are the copy's."""
    right = (row_index[:, None] == column_index[None]).float()
    right /= right.sum(dim=1, keepdim=True)
    losses = []
    for one, other in ((0, 1), (1, 0)):
        soft = similarity(rows[2 + one], columns[2 + other], logit_scale).detach().softmax(dim=1)
        losses.append(
            F.cross_entropy(
                similarity(rows[one], columns[other], logit_scale), right.lerp(soft, alpha)
            )
        )
    return torch.stack(losses).mean()


def extensions(momentum: Momentum) -> Extensions:
    """Returns what `train` takes."""
    return Extensions(
        objectives={
            "momentum_itc": Objective(loss=momentum.itc, heads=("itc",), fuses=False),
            "momentum_mlm": Objective(loss=momentum.mlm, heads=("mlm",), texts=("masked",)),
        },
        callbacks=(momentum,),
    )


MOMENTUM = extensions(Momentum())
