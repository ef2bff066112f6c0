"""NLVR2: is a statement about two images true?"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from bridgetower.data.batch import Nlvr2Batch
from bridgetower.model.bridgetower import SECOND_IMAGE, BridgeTower
from bridgetower.objectives.losses import Losses, class_loss, known


class Nlvr2Task(nn.Module):
    """The NLVR2 head on the pooled outputs of the statement with either image.

    Official: the text tower runs once per image; here: once.
    """

    def __init__(self, model: BridgeTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Nlvr2Batch) -> Losses:
        """Returns the cross-entropy and the accuracy.

        Raises:
            ValueError: The batch has no labels, or the model no NLVR2 head.
        """
        loss, accuracy = class_loss(self.logits(batch), known(batch.labels))
        return Losses({"nlvr2": loss}, loss, {"accuracy": accuracy})

    def predict(self, batch: Nlvr2Batch) -> Float[Tensor, "b k"]:
        """Returns the probabilities of false and true."""
        return self.logits(batch).float().softmax(dim=-1)

    def logits(self, batch: Nlvr2Batch) -> Float[Tensor, "b k"]:
        """Returns the logits of false and true."""
        first = self.model.encode_image(batch.pixel_values)
        second = self.model.encode_image(batch.pixel_values_2, SECOND_IMAGE)
        text = self.model.encode_text(batch.input_ids, batch.attention_mask)
        return self.model.class_logits("nlvr2", self.model.pooled_with_two(first, second, text))
