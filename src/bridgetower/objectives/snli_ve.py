"""Visual entailment: does an image contradict a statement, leave it open, or entail it?"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from bridgetower.data.batch import SnliVeBatch
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.objectives.losses import Losses, class_loss, known


class SnliVeTask(nn.Module):
    """The SNLI-VE head on the pooled output."""

    def __init__(self, model: BridgeTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: SnliVeBatch) -> Losses:
        """Returns the cross-entropy and the accuracy.

        Raises:
            ValueError: The batch has no labels, or the model no SNLI-VE head.
        """
        loss, accuracy = class_loss(self.logits(batch), known(batch.labels))
        return Losses({"snli_ve": loss}, loss, {"accuracy": accuracy})

    def predict(self, batch: SnliVeBatch) -> Float[Tensor, "b k"]:
        """Returns the probabilities of contradiction, neutral and entailment."""
        return self.logits(batch).float().softmax(dim=-1)

    def logits(self, batch: SnliVeBatch) -> Float[Tensor, "b k"]:
        """Returns the logits of the three classes."""
        text = self.model.encode_text(batch.input_ids, batch.attention_mask)
        fused = self.model.fuse(self.model.encode_image(batch.pixel_values), text)
        return self.model.class_logits("snli_ve", fused.pooled)
