"""Attention weights of the fusion encoder, and what they say of its layers: distance, entropy, divergence of heads."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridgetower.data.captions import CaptionImages
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.hidden_states import FusionAttention, hidden_states
from bridgetower.progress import counted

_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class LayerAttention:
    """One attention of one fusion layer, as means over pairs and positions that attend.

    Attributes:
        distance: Mean distance from a position to those that it attends to, of each head: between the centres of
            patches in pixels, in tokens of a text; None for attention to the other stream. Without the image's prefix
            tokens.
        entropy: Of the weights of each head, in nats.
        divergence: KL divergence of the weights of a head from those of another, in nats, mean over pairs of heads.
    """

    distance: list[float] | None
    entropy: list[float]
    divergence: float


@torch.inference_mode()
def attention_statistics(
    model: BridgeTower, images: CaptionImages, *, count: int = 64, batch_size: int = 8, progress: bool = False
) -> dict[FusionAttention, list[LayerAttention]]:
    """Measures the attention of the fusion encoder on images with their own first captions.

    As in the analyses of the paper and of Dosovitskiy et al. (2021): a head of small distance is local, one of small
    entropy looks at few positions, and heads of small divergence do the same.

    Args:
        model: In evaluation mode.
        images: With captions.
        count: Pairs, spread evenly over the set; all of a set that has fewer.
        batch_size: Pairs at once.
        progress: Show a bar.

    Returns:
        Layers by kind, the first layer first.

    Raises:
        ValueError: There are no pairs, or an image cannot be decoded.
    """
    if count < 1 or batch_size < 1:
        raise ValueError(f"count is {count} and batch_size {batch_size}; expected at least 1")
    sums = _Sums(model)
    count = min(count, len(images))
    rows = torch.arange(count) * (len(images) - 1) // max(1, count - 1)
    for batch in counted(rows.split(batch_size), "batches", shown=progress):
        numbers = batch.tolist()
        texts = images.processor.texts([captions[0] for captions in images.captions(numbers)], truncate=True)
        pixels = images.pixel_values(numbers)
        assert isinstance(pixels, Tensor)  # nothing is cached here
        sums.add(
            pixels.to(model.device, model.token_type_embedding.weight.dtype),
            texts.input_ids.to(model.device),
            None if texts.attention_mask is None else texts.attention_mask.bool().to(model.device),
        )
    return sums.means()


class _Sums:
    """Sums over positions that attend."""

    def __init__(self, model: BridgeTower) -> None:
        self._model, self._layers = model, range(1, model.config.fusion.num_layers + 1)
        self._sums: dict[tuple[FusionAttention, int, str], Tensor] = defaultdict(lambda: torch.zeros(()))
        self._counts: dict[tuple[FusionAttention, int, str], int] = defaultdict(int)

    def add(self, pixel_values: Tensor, input_ids: Tensor, mask: Tensor | None) -> None:
        """Adds pairs."""
        found = hidden_states(
            self._model, pixel_values, input_ids, mask, layers={"fusion": self._layers}, attentions=True
        )
        for kind in get_args(FusionAttention):
            for layer, weights in found.attentions[kind].items():
                attends = torch.ones_like(weights[:, 0, :, 0], dtype=torch.bool)  # positions that are no padding
                if mask is not None and kind.startswith("text"):
                    attends = mask
                self._add(kind, layer, "entropy", -(weights * weights.clamp(min=_TINY).log()).sum(dim=-1), attends)
                self._add(kind, layer, "divergence", _divergence(weights)[:, None], attends)
                if kind.endswith("self"):
                    self._add_distance(kind, layer, weights, attends)

    def _add_distance(self, kind: FusionAttention, layer: int, weights: Tensor, attends: Tensor) -> None:
        config = self._model.config
        if kind == "image self":
            prefix = config.vision.num_prefix_tokens
            weights, attends = weights[:, :, prefix:, prefix:], attends[:, prefix:]
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=_TINY)
            size = config.vision.patch_size * config.fusion.merge_patches
            side = config.vision.image_size // size
            places = size * torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
        else:
            places = torch.arange(weights.shape[-1])[:, None].float()
        distances = torch.cdist(places, places).to(weights)
        self._add(kind, layer, "distance", (weights * distances).sum(dim=-1), attends)

    def _add(
        self, kind: FusionAttention, layer: int, name: str, values: Float[Tensor, "b h q"], attends: Bool[Tensor, "b q"]
    ) -> None:
        chosen = values.masked_fill(~attends[:, None], 0.0)
        self._sums[kind, layer, name] = self._sums[kind, layer, name] + chosen.sum(dim=(0, 2)).double().cpu()
        self._counts[kind, layer, name] += int(attends.sum())

    def means(self) -> dict[FusionAttention, list[LayerAttention]]:
        """Returns the means of each layer."""

        def mean(kind: FusionAttention, layer: int, name: str) -> list[float]:
            values: list[float] = (self._sums[kind, layer, name] / self._counts[kind, layer, name]).tolist()
            return values

        return {
            kind: [
                LayerAttention(
                    distance=mean(kind, layer, "distance") if kind.endswith("self") else None,
                    entropy=mean(kind, layer, "entropy"),
                    divergence=mean(kind, layer, "divergence")[0],
                )
                for layer in self._layers
            ]
            for kind in get_args(FusionAttention)
        }


def _divergence(weights: Float[Tensor, "b h q m"]) -> Float[Tensor, "b q"]:
    """Mean over ordered pairs of different heads of KL(one ‖ other); 0 for a single head."""
    heads = weights.shape[1]
    logs = weights.clamp(min=_TINY).log()
    own = (weights * logs).sum(dim=-1)  # [B, H, Q]
    crossed = weights.transpose(1, 2) @ logs.transpose(1, 2).mT  # [B, Q, H, H]
    total = heads * own.sum(dim=1) - crossed.sum(dim=(2, 3))
    return total / max(1, heads * (heads - 1))
