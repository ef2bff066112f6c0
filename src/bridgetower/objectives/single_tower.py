"""The paper's uni-modal checks: CIFAR on the image tower alone, GLUE on the text tower alone."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bridgetower.data.batch import ImageBatch, TextBatch
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.objectives.losses import Losses, class_loss, known


class ImageTask(nn.Module):
    """A linear head on the image tower's class token: CIFAR-10 and CIFAR-100.

    Official `run_cifar.py` gives the optimiser the tower only and leaves the head at its random start; here it learns.
    """

    def __init__(self, model: BridgeTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: ImageBatch) -> Losses:
        """Returns the cross-entropy and the accuracy.

        Raises:
            ValueError: The batch has no labels, or the model no head on the image tower.
        """
        loss, accuracy = class_loss(self.logits(batch), known(batch.labels))
        return Losses({"image": loss}, loss, {"accuracy": accuracy})

    def predict(self, batch: ImageBatch) -> Float[Tensor, "b k"]:
        """Returns the probability of each class."""
        return self.logits(batch).float().softmax(dim=-1)

    def logits(self, batch: ImageBatch) -> Float[Tensor, "b k"]:
        """Returns the logits of the classes."""
        return self.model.class_logits("image", self.model.encode_image(batch.pixel_values, outputs="cls").cls)


class TextTask(nn.Module):
    """RoBERTa's classification head on the text tower's CLS: the tasks of GLUE.

    A head of one output predicts a number, with the mean squared error as its loss (STS-B).
    """

    def __init__(self, model: BridgeTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TextBatch) -> Losses:
        """Returns the loss and, of classes, the accuracy.

        Raises:
            ValueError: The batch has no labels, or the model no head on the text tower.
        """
        logits, labels = self.logits(batch), known(batch.labels)
        if self.regresses:
            loss = F.mse_loss(logits[:, 0].float(), labels.float())
            return Losses({"text": loss}, loss)
        loss, accuracy = class_loss(logits, labels)
        return Losses({"text": loss}, loss, {"accuracy": accuracy})

    def predict(self, batch: TextBatch) -> Float[Tensor, "b k"]:
        """Returns the probability of each class, or the predicted number."""
        logits = self.logits(batch).float()
        return logits if self.regresses else logits.softmax(dim=-1)

    def logits(self, batch: TextBatch) -> Float[Tensor, "b k"]:
        """Returns the logits of the classes, or one number."""
        text = self.model.encode_text(batch.input_ids, batch.attention_mask, outputs="cls")
        return self.model.class_logits("text", text.cls)

    @property
    def regresses(self) -> bool:
        """Whether the head predicts a number."""
        return self.model.config.heads.text == 1
