"""Classes, answers or numbers from a head on the model: what the downstream tasks share."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bridgetower.data.batch import Batch
from bridgetower.model.bridgetower import SECOND_IMAGE, BridgeTower
from bridgetower.objectives.encoding import encode_image, encode_text
from bridgetower.objectives.losses import Losses, class_loss, vqa_loss

Loss = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""Logits and labels to the loss and metrics beside it."""


class ClassificationTask(nn.Module):
    """A head on what its examples have: the pooled output, that of two images, or the CLS of one tower.

    With two images, the official code runs the text tower once per image; here it runs once. Official `run_cifar.py`
    leaves the head on the image tower at its random start; here it learns.
    """

    graph = "classification"
    """The same parameters get gradients in every step."""

    def __init__(
        self,
        model: BridgeTower,
        head: str,
        *,
        loss: Loss,
        probabilities: Callable[[Float[Tensor, "b k"]], Float[Tensor, "b k"]],
    ) -> None:
        super().__init__()
        self.model, self.head = model, head
        self.loss, self.probabilities = loss, probabilities

    def forward(self, batch: Batch) -> Losses:
        """Returns the loss and its metrics."""
        logits = self.logits(batch)
        if batch.labels is None:
            raise ValueError("this batch has no labels; train and validate on a split that has them")
        loss, metrics = self.loss(logits.float(), batch.labels)
        return Losses({self.head: loss}, loss, metrics)

    def predict(self, batch: Batch) -> Float[Tensor, "b k"]:
        """Returns the probability of each class, or the predicted number."""
        return self.probabilities(self.logits(batch).float())

    def logits(self, batch: Batch) -> Float[Tensor, "b k"]:
        """Returns the logits of the classes, or one number."""
        return self.model.class_logits(self.head, self._features(batch))

    def _features(self, batch: Batch) -> Float[Tensor, "b f"]:
        """What the head reads, computed from the inputs that the batch has."""
        model = self.model
        if batch.input_ids is None:
            assert batch.pixel_values is not None
            return encode_image(model, batch.pixel_values, outputs="cls").cls
        if batch.pixel_values is None:
            return encode_text(model, batch.input_ids, batch.attention_mask, outputs="cls").cls
        if batch.pixel_values_2 is None:
            text = encode_text(model, batch.input_ids, batch.attention_mask)
            return model.fuse(encode_image(model, batch.pixel_values), text).pooled
        first = encode_image(model, batch.pixel_values)
        second = encode_image(model, batch.pixel_values_2, SECOND_IMAGE)
        text = encode_text(model, batch.input_ids, batch.attention_mask)
        return model.pooled_with_two(first, second, text)


def task_of_head(model: BridgeTower, head: str) -> ClassificationTask:
    """Returns the usual task of a head: the loss follows from what its outputs are."""
    if head == "vqa":
        return answerer(model)
    if model.config.heads.predicts_number(head):
        return regressor(model, head)
    several = head == "classification" and model.config.heads.multi_label
    return (_multi_label_classifier if several else classifier)(model, head)


def classifier(model: BridgeTower, head: str) -> ClassificationTask:
    """Returns a task with one right class per example: cross-entropy, and the accuracy."""

    def loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value, accuracy = class_loss(logits, labels)
        return value, {"accuracy": accuracy}

    return ClassificationTask(model, head, loss=loss, probabilities=lambda logits: logits.softmax(dim=-1))


def _multi_label_classifier(model: BridgeTower, head: str) -> ClassificationTask:
    """Returns a task with any number of right classes per example: mean binary cross-entropy, and the accuracy."""

    def loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        right = ((logits > 0) == (labels > 0.5)).float().mean()
        return F.binary_cross_entropy_with_logits(logits, labels.float()), {"label_accuracy": right.detach()}

    return ClassificationTask(model, head, loss=loss, probabilities=lambda logits: logits.sigmoid())


def regressor(model: BridgeTower, head: str) -> ClassificationTask:
    """Returns a task whose head has one output, a number: mean squared error."""

    def loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return F.mse_loss(logits[:, 0], labels.float()), {}

    return ClassificationTask(model, head, loss=loss, probabilities=lambda logits: logits)


def answerer(model: BridgeTower) -> ClassificationTask:
    """Returns the task of the head `vqa`: classes are answers, each judged on its own; the metric is VQA's score."""

    def loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value, score = vqa_loss(logits, targets)
        return value, {"vqa_score": score}

    return ClassificationTask(model, "vqa", loss=loss, probabilities=lambda logits: logits.sigmoid())
