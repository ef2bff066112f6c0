"""Visual question answering: a score for every answer of the vocabulary."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from bridgetower.data.batch import VqaBatch
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.objectives.losses import Losses, known, vqa_loss


class VqaTask(nn.Module):
    """The VQA head on the pooled output; every answer is judged on its own."""

    def __init__(self, model: BridgeTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: VqaBatch) -> Losses:
        """Returns the loss and the mean score of the likeliest answers.

        Raises:
            ValueError: The batch has no targets, or the model no VQA head.
        """
        loss, score = vqa_loss(self.logits(batch), known(batch.targets))
        return Losses({"vqa": loss}, loss, {"vqa_score": score})

    def predict(self, batch: VqaBatch) -> Float[Tensor, "b k"]:
        """Returns the probability of each answer; they do not sum to one."""
        return self.logits(batch).float().sigmoid()

    def logits(self, batch: VqaBatch) -> Float[Tensor, "b k"]:
        """Returns the logits of the answers."""
        text = self.model.encode_text(batch.input_ids, batch.attention_mask)
        fused = self.model.fuse(self.model.encode_image(batch.pixel_values), text)
        return self.model.class_logits("vqa", fused.pooled)
