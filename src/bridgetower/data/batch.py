"""Batches: what a data loader hands to a task."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor


# Not frozen: Fabric copies what goes into a wrapped module, and refuses frozen dataclasses.
@dataclass(kw_only=True)
class CaptionBatch:
    """Images with one caption each.

    Attributes:
        attention_mask: 0 on padding; None if nothing is padded.
        masked_input_ids, mlm_labels: The same texts with words hidden, and the hidden ids (-100 elsewhere).
        image_index: Equal numbers mark the same image, across all ranks.
        image_ids: Names for error messages.
        seed: Of everything that is drawn while the batch is processed.
    """

    pixel_values: Float[Tensor, "b 3 h w"]
    input_ids: Int[Tensor, "b l"]
    attention_mask: Int[Tensor, "b l"] | None
    masked_input_ids: Int[Tensor, "b l"]
    mlm_labels: Int[Tensor, "b l"]
    image_index: Int[Tensor, " b"]
    image_ids: tuple[str, ...] = ()
    seed: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device) -> Self:
        """Moves every tensor."""
        moved: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                moved[item.name] = value.to(device, non_blocking=True)
        return replace(self, **moved)
