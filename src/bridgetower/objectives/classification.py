"""Classes, answers or numbers from a head on the model: what the downstream tasks share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bridgetower.data.batches.batch import Batch
from bridgetower.model.bridgetower import SECOND_IMAGE, BridgeTower
from bridgetower.model.heads import predictions
from bridgetower.objectives.losses import Losses, class_loss

Loss = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""Logits and labels to the loss and metrics beside it."""


class ClassificationTask(nn.Module):
    """A head on the pooled output of a pair, or on those of two images with one text.

    The text tower runs once for both images, in the official code twice.
    """

    def __init__(
        self,
        model: BridgeTower,
        head: str,
        *,
        loss: Loss,
        probabilities: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.loss = loss
        self.probabilities = probabilities

    def forward(self, batch: Batch) -> Losses:
        logits = self.logits(batch)
        if batch.labels is None:
            raise ValueError(
                "this batch has no labels; train and validate on a split that has them"
            )
        loss, metrics = self.loss(logits.float(), batch.labels)
        return Losses({self.head: loss}, loss, metrics)

    def predict(self, batch: Batch) -> Float[Tensor, "b k"]:
        """Returns the probability of each class, or the predicted number."""
        return self.probabilities(self.logits(batch).float())

    def logits(self, batch: Batch) -> Float[Tensor, "b k"]:
        model = self.model
        assert batch.input_ids is not None  # a batch of this task has texts, if empty ones
        image = model.encode_image(batch.pixel_values, states=batch.image_states)
        text = model.encode_text(batch.input_ids, batch.attention_mask, states=batch.text_states)
        if batch.num_images == 1:
            features = model.fuse(image, text).pooled
        else:
            states = batch.image_states_2
            image_2 = model.encode_image(batch.pixel_values_2, SECOND_IMAGE, states=states)
            text = model.cache_text(text)
            pooled = model.fuse(image, text).pooled
            pooled_2 = model.fuse(image_2, text).pooled
            features = torch.cat([pooled, pooled_2], dim=-1)
        return model.head(self.head)(features)


def task_of_head(model: BridgeTower, head: str) -> ClassificationTask:
    """Returns the task of a head: squared error of a number, cross-entropy of a class, or of each answer or label."""
    outputs = model.head_outputs(head)

    def loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if outputs == "number":
            return F.mse_loss(logits[:, 0], labels.float()), {}
        # Official `compute_vqa`, after Kim et al., "Bilinear Attention Networks" (2018).
        if head == "vqa":
            scores = labels.gather(1, logits.argmax(dim=1, keepdim=True))
            value = F.binary_cross_entropy_with_logits(logits, labels) * labels.shape[1]
            return value, {"vqa_score": scores.mean().detach()}
        if outputs == "sigmoid":
            is_right = (logits > 0) == (labels > 0.5)
            value = F.binary_cross_entropy_with_logits(logits, labels.float())
            return value, {"label_accuracy": is_right.float().mean().detach()}
        value, accuracy = class_loss(logits, labels)
        return value, {"accuracy": accuracy}

    probabilities = partial(predictions, outputs=outputs)
    return ClassificationTask(model, head, loss=loss, probabilities=probabilities)
