"""A model that is served: its name, what it can do, and what prepares inputs for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from bridgetower.inference import HEAD_OF, Item, Tokens
from bridgetower.predictor import Predictor
from bridgetower.processor import Resized
from bridgetower.serve.inputs import Inputs

Use = Literal["embeddings", "match", "fill-mask", "explain", "answer", "entail", "reason", "classify"]


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model with what requests need of it.

    Attributes:
        name: What clients call it.
        predictor: The model.
        inputs: Prepares pictures and texts.
    """

    name: str
    predictor: Predictor
    inputs: Inputs

    def lacking(self, use: Use) -> str | None:
        """Returns what the model lacks for a use, None if it can serve it."""
        model = self.predictor.model
        heads: dict[Use, str] = {"embeddings": "itc", "match": "itm", "fill-mask": "mlm"}
        try:
            if use in HEAD_OF:
                self.predictor.class_names(HEAD_OF[use])
            elif use in heads:
                model.head(heads[use])
        except ValueError as error:
            beside = ", and name it with --answer-model when the server is started"
            return str(error) + (beside if use == "answer" and model.vqa_head is None else "")
        return None

    def tokens(self, images: Sequence[Resized], texts: Sequence[Tokens]) -> int:
        """Returns how many positions the towers read: those of texts, and a patch or a CLS each of pictures."""
        return len(images) * self.predictor.model.config.vision.num_tokens + sum(map(len, texts))

    def pair(self) -> Item:
        """Returns a pair to compute before the first request, which runs all of the model but its heads."""
        processor = self.predictor.processor
        side = processor.config.image_size
        return Item(
            image=torch.zeros(3, side, side, dtype=torch.uint8), ids=(processor.bos_token_id, processor.eos_token_id)
        )
