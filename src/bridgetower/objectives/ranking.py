"""Retrieval fine-tuning without contrast: find the true text of an image among false ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bridgetower.data.batch import RankingBatch
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.fusion import Encoded
from bridgetower.objectives.config import RankingConfig
from bridgetower.objectives.losses import Losses, class_loss
from bridgetower.objectives.matching import matching_loss, random_pairs


class RankingTask(nn.Module):
    """Cross-entropy of the true text's score against those of the false texts, and matching beside it.

    Official `compute_irtr`, which crashes: it stacks tensors of different shapes. Its run config also switches
    matching on, with the head of pre-training kept as it is; so here.
    """

    graph = "ranking"
    """The same parameters get gradients in every step."""

    def __init__(self, model: BridgeTower, config: RankingConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        if config.itm:
            model.head("itm").requires_grad_(False)

    def forward(self, batch: RankingBatch) -> Losses:
        image, text = self.encode(batch)
        scores = self.scores(image, text)
        true = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        loss, accuracy = class_loss(scores, true)
        parts, metrics = {"rank": loss}, {"rank_accuracy": accuracy}
        if self.config.itm:
            parts["itm"], metrics["itm_accuracy"] = self.itm(image, text, batch)
        weights: Mapping[str, float] = {"rank": 1.0, "itm": self.config.itm}
        return Losses.weigh(parts, weights, metrics)

    def predict(self, batch: RankingBatch) -> Float[Tensor, "b n"]:
        """Returns the probability of each text to be the true one among those of its image."""
        return F.softmax(self.scores(*self.encode(batch)).float(), dim=-1)

    def encode(self, batch: RankingBatch) -> tuple[Encoded, Encoded]:
        model = self.model
        image = model.cache_image(model.encode_image(batch.pixel_values, states=batch.image_states))
        return image, model.encode_text(batch.input_ids, batch.attention_mask, states=batch.text_states)

    def scores(self, image: Encoded, text: Encoded) -> Float[Tensor, "b n"]:
        num_texts = len(text) // len(image)
        rows = torch.arange(len(image), device=image.cls.device).repeat_interleave(num_texts)
        return self.model.head("rank")(self.model.fuse(image[rows], text).pooled).unflatten(0, (-1, num_texts))

    def itm(self, image: Encoded, text: Encoded, batch: RankingBatch) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Matching loss and accuracy of the true texts, half of them with another image of the batch."""
        pairs = random_pairs(batch.image_index, torch.Generator().manual_seed(batch.seed))
        true_texts = pairs.text_rows * (len(text) // len(image))
        fused = self.model.fuse(image[pairs.image_rows], text[true_texts])
        return matching_loss(self.model.itm_logits(fused.pooled), pairs.labels)
