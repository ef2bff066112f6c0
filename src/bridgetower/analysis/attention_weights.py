"""Attention weights of the fusion encoder, and what they say of its layers: distance, entropy, divergence of heads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridgetower.data.captions import CaptionImages
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.encodings import Encoded, Fused
from bridgetower.model.fusion import FusionLayer
from bridgetower.progress import counted

AttentionKind = Literal["image self", "text self", "image to text", "text to image"]
"""Attention within a stream, and from the positions of one stream to those of the other."""

Receive = Callable[[AttentionKind, int, Float[Tensor, "b h q m"]], None]
_TINY = 1e-30


def attention_weights(model: BridgeTower, image: Encoded, text: Encoded, receive: Receive) -> Fused:
    """Fuses pairs, and calls `receive` with the weights of every attention of the fusion encoder.

    The layers never form these weights; they are computed again from the queries and keys that they get.

    Args:
        model: Its kernels for CPUs fuse some pairs after others; here all are fused together.
        image: From `encode_image`. What is cached of its first layer is not used, since it is not attended again.
        text: From `encode_text`, as many; likewise.
        receive: Gets kind, layer (from 0) and softmax(q·kᵀ / √e) [B, H, Q, M].

    Returns:
        Both streams and the pooled outputs.
    """

    def hook(kind: AttentionKind, layer: int) -> Callable[..., None]:
        def compute(module: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
            query, key, _, mask = inputs
            queries, keys = module.split_heads(query), module.split_heads(key)
            scores = queries @ keys.mT / queries.shape[-1] ** 0.5
            if mask is not None:
                scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
            receive(kind, layer, scores.float().softmax(dim=-1))

        return compute

    streams = {"image": model.fusion.image_layers, "text": model.fusion.text_layers}
    crossed: Mapping[str, AttentionKind] = {"image": "image to text", "text": "text to image"}
    with ExitStack() as hooks:
        for stream, layers in streams.items():
            own = cast(AttentionKind, f"{stream} self")
            for number, layer in enumerate(cast(Sequence[FusionLayer], layers)):
                for kind, attention in ((own, layer.self_attention), (crossed[stream], layer.cross_attention)):
                    hooks.enter_context(attention.attention.register_forward_pre_hook(hook(kind, number)))
        image, text = replace(image, first_layer_cache=None), replace(text, first_layer_cache=None)
        return BridgeTower.fuse(model, image, text, outputs="all")


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
) -> dict[AttentionKind, list[LayerAttention]]:
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
        texts = images.processor.texts([images.captions[image][0] for image in numbers], truncate=True)
        pixels = images.pixel_values(numbers)
        assert isinstance(pixels, Tensor)  # nothing is cached here
        image = model.encode_image(pixels.to(model.device, model.token_type_embedding.weight.dtype))
        mask = None if texts.attention_mask is None else texts.attention_mask.to(model.device)
        sums.add(image, model.encode_text(texts.input_ids.to(model.device), mask))
    return sums.means()


class _Sums:
    """Sums over positions that attend."""

    def __init__(self, model: BridgeTower) -> None:
        self._model = model
        self._sums: dict[tuple[AttentionKind, int, str], Tensor] = defaultdict(lambda: torch.zeros(()))
        self._counts: dict[tuple[AttentionKind, int, str], int] = defaultdict(int)

    def add(self, image: Encoded, text: Encoded) -> None:
        """Adds pairs."""
        kinds = {"image self": image, "image to text": image, "text self": text, "text to image": text}

        def receive(kind: AttentionKind, layer: int, weights: Float[Tensor, "b h q m"]) -> None:
            attends = _attending(kinds[kind])
            self._add(kind, layer, "entropy", -(weights * weights.clamp(min=_TINY).log()).sum(dim=-1), attends)
            self._add(kind, layer, "divergence", _divergence(weights)[:, None], attends)
            if kind.endswith("self"):
                self._add_distance(kind, layer, weights, attends)

        attention_weights(self._model, image, text, receive)

    def _add_distance(self, kind: AttentionKind, layer: int, weights: Tensor, attends: Tensor) -> None:
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
        self, kind: AttentionKind, layer: int, name: str, values: Float[Tensor, "b h q"], attends: Bool[Tensor, "b q"]
    ) -> None:
        chosen = values.masked_fill(~attends[:, None], 0.0)
        self._sums[kind, layer, name] = self._sums[kind, layer, name] + chosen.sum(dim=(0, 2)).double().cpu()
        self._counts[kind, layer, name] += int(attends.sum())

    def means(self) -> dict[AttentionKind, list[LayerAttention]]:
        """Returns the means of each layer."""

        def mean(kind: AttentionKind, layer: int, name: str) -> list[float]:
            values: list[float] = (self._sums[kind, layer, name] / self._counts[kind, layer, name]).tolist()
            return values

        return {
            kind: [
                LayerAttention(
                    distance=mean(kind, layer, "distance") if kind.endswith("self") else None,
                    entropy=mean(kind, layer, "entropy"),
                    divergence=mean(kind, layer, "divergence")[0],
                )
                for layer in range(self._model.config.fusion.num_layers)
            ]
            for kind in get_args(AttentionKind)
        }


def _attending(encoded: Encoded) -> Bool[Tensor, "b q"]:
    """Positions that are no padding."""
    hidden = encoded.layers[0]
    if encoded.mask is not None:
        return encoded.mask
    return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)


def _divergence(weights: Float[Tensor, "b h q m"]) -> Float[Tensor, "b q"]:
    """Mean over ordered pairs of different heads of KL(one ‖ other); 0 for a single head."""
    heads = weights.shape[1]
    logs = weights.clamp(min=_TINY).log()
    own = (weights * logs).sum(dim=-1)  # [B, H, Q]
    crossed = weights.transpose(1, 2) @ logs.transpose(1, 2).mT  # [B, Q, H, H]
    total = heads * own.sum(dim=1) - crossed.sum(dim=(2, 3))
    return total / max(1, heads * (heads - 1))
