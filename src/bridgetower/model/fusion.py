"""The cross-modal encoder: encodings of the towers in, which can be cut, joined and repeated, fused pairs out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bridgetower.model.bridges import BRIDGES, Bridge, BridgeBuilder, TowerLayers
from bridgetower.model.config import FusionConfig, look_up
from bridgetower.model.layers import (
    CrossAttention,
    FeedForward,
    SelfAttention,
    TokenMask,
    activation_checkpointing,
)

FusionOutputs = Literal["pooled", "text", "all"]
Index = Int[Tensor, " n"] | Bool[Tensor, " b"] | slice
Mask = Int[Tensor, "b l"] | Bool[Tensor, "b l"] | None


class FirstLayerCache(NamedTuple):
    """What the first fusion layer computes of one stream before it meets the other; one serves many pairs.

    That is self-attention with its norm, the queries of cross-attention, and what the other stream reads of this one.
    """

    attended: Float[Tensor, "b l d"]
    query: Float[Tensor, "b l d"]
    key_value: Float[Tensor, "b l e"]


class TakenLayers(Sequence[Tensor]):
    """Rows of the layers of an encoding, each layer copied only when it is read, and not kept."""

    def __init__(self, layers: Sequence[Float[Tensor, "b l d"]], rows: Int[Tensor, " n"]) -> None:
        self.layers: Sequence[Tensor] = layers
        self.rows: Tensor = rows
        if isinstance(layers, TakenLayers):
            self.layers, self.rows = layers.layers, layers.rows[rows]

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return TakenLayers(self.layers[index], self.rows)
        return self.layers[index][self.rows]


@dataclass(frozen=True)
class Encoded:
    """One modality of a batch, ready to be fused with any encoding of the other modality.

    Attributes:
        layers: The bridged hidden states of the tower, projected to the fusion width, token type added.
        cls: The tower's last CLS before projection, the contrastive head's input.
        mask: False on padding; None if nothing is padded (always for images).
        first_layer_cache: What the first fusion layer computes of it alone; None: computed again in every `fuse`.
    """

    layers: Sequence[Float[Tensor, "b l d"]]
    cls: Float[Tensor, "b w"]
    mask: Bool[Tensor, "b l"] | None = None
    first_layer_cache: FirstLayerCache | None = None

    def __len__(self) -> int:
        return len(self.cls)

    def __getitem__(self, index: Index) -> Encoded:
        """Selects samples; an index may repeat, so one encoding serves many pairs."""
        if isinstance(index, slice) and not isinstance(self.layers, TakenLayers):
            return self.map(lambda tensor: tensor[index])
        rows = torch.arange(len(self), device=self.cls.device)[index]
        return self.map(lambda tensor: tensor[rows], TakenLayers(self.layers, rows))

    def map(
        self, function: Callable[[Tensor], Tensor], layers: Sequence[Tensor] | None = None
    ) -> Encoded:
        """Applies a function to all tensors, but those of the layers if they are given."""
        layers = tuple(map(function, self.layers)) if layers is None else layers
        mask, cache = self.mask, self.first_layer_cache
        return Encoded(
            layers,
            function(self.cls),
            None if mask is None else function(mask),
            None if cache is None else FirstLayerCache(*map(function, cache)),
        )

    def padded(self, length: int) -> Encoded:
        missing = length - self.layers[0].shape[1]
        if missing < 0:
            raise ValueError(
                f"{self.layers[0].shape[1]} tokens do not fit into {length}; pad to at least as many"
            )
        mask = self.mask
        if mask is None:
            mask = torch.ones(self.layers[0].shape[:2], dtype=torch.bool, device=self.cls.device)

        def pad(tensor: Tensor) -> Tensor:
            if tensor.ndim == 3:
                return F.pad(tensor, (0, 0, 0, missing))
            # the mask, or the CLS
            return F.pad(tensor, (0, missing)) if tensor.dtype == torch.bool else tensor

        return replace(self, mask=mask).map(pad)

    @staticmethod
    def cat(parts: Sequence[Encoded]) -> Encoded:
        """Joins batches along samples, padding texts of different lengths to the longest."""
        if not parts:
            raise ValueError("no encodings given; expected at least one")
        lengths = {part.layers[0].shape[1] for part in parts if part.layers}
        if len(lengths) > 1 or any(part.mask is not None for part in parts):
            parts = [part.padded(max(lengths)) for part in parts]
        masks = [part.mask for part in parts if part.mask is not None]
        caches = [part.first_layer_cache for part in parts if part.first_layer_cache is not None]
        return Encoded(
            tuple(map(torch.cat, zip(*(part.layers for part in parts), strict=True))),
            torch.cat([part.cls for part in parts]),
            torch.cat(masks) if masks else None,
            FirstLayerCache(*map(torch.cat, zip(*caches, strict=True)))
            if len(caches) == len(parts)
            else None,
        )


_NOT_COMPUTED = cast(Tensor, None)  # so that callers, who know what they asked for, need no checks


class Fused(NamedTuple):
    """Outputs of the fusion encoder; those that were not asked for are None.

    Attributes:
        text: The text stream, of outputs `text` and `all`.
        image: The image stream, of `all`.
        pooled: The pooled outputs of text and image side by side, of `pooled` and `all`.
    """

    text: Float[Tensor, "b l d"] = _NOT_COMPUTED
    image: Float[Tensor, "b p d"] = _NOT_COMPUTED
    pooled: Float[Tensor, "b e"] = _NOT_COMPUTED


class FusionLayer(nn.Module):
    """One stream's layer: self-attention, cross-attention to the other stream's input, feed-forward; all post-norm."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width, heads, eps = config.hidden_size, config.num_heads, config.layer_norm_eps
        attention_dropout = (
            config.dropout if config.attention_dropout is None else config.attention_dropout
        )
        self.self_attention = SelfAttention(width, heads, attention_dropout)
        self.self_attention_norm = nn.LayerNorm(width, eps=eps)
        self.cross_attention = CrossAttention(width, heads, attention_dropout)
        self.cross_attention_norm = nn.LayerNorm(width, eps=eps)
        self.mlp = FeedForward(width, config.intermediate_size, config.activation)
        self.mlp_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden: Float[Tensor, "b l d"],
        other: Float[Tensor, "b m d"],
        *,
        mask: TokenMask = None,
        other_mask: Bool[Tensor, "b m"] | None = None,
        num_queries: int | None = None,
        cache: FirstLayerCache | None = None,
        other_cache: FirstLayerCache | None = None,
    ) -> Float[Tensor, "b q d"]:
        """Returns the stream's output; a cache stands for what is computed of one of the streams alone."""
        if cache is None:
            attended, query = self._attend(hidden, mask, num_queries)
        else:
            attended, query = cache.attended[:, :num_queries], cache.query[:, :num_queries]
        key_value = (
            self.cross_attention.key_value(other) if other_cache is None else other_cache.key_value
        )
        crossed = self.cross_attention(query, key_value, other_mask)
        queries = self.cross_attention_norm(attended + self.dropout(crossed))
        return self.mlp_norm(queries + self.dropout(self.mlp(queries)))

    # Of a sharded layer the weights are there while `forward`, `attend` or `key_value` runs, and gone after each.
    def key_value(self, hidden: Float[Tensor, "b l d"]) -> Float[Tensor, "b l e"]:
        return self.cross_attention.key_value(hidden)

    def _attend(
        self, hidden: Float[Tensor, "b l d"], mask: TokenMask, num_queries: int | None = None
    ) -> tuple[Float[Tensor, "b q d"], Float[Tensor, "b q d"]]:
        """Returns self-attention with its norm, and the queries of cross-attention: what needs this stream only."""
        attended = self.self_attention(hidden, mask, num_queries)
        attended = self.self_attention_norm(hidden[:, :num_queries] + self.dropout(attended))
        return attended, self.cross_attention.query(attended)

    attend = _attend


class FusionEncoder(nn.Module):
    """K layers of two streams; layer ℓ > 1 reads BridgeLayer(previous output, tower layer ℓ) of its modality."""

    def __init__(
        self, config: FusionConfig, bridges: Mapping[str, BridgeBuilder] = BRIDGES
    ) -> None:
        super().__init__()
        self.checkpoint_activations = False
        width, eps = config.hidden_size, config.bridge_layer_norm_eps
        normalised = config.input_norm and config.first_bridge > 1
        self.text_norm = nn.LayerNorm(width, eps=eps) if normalised else nn.Identity()
        self.image_norm = nn.LayerNorm(width, eps=eps) if normalised else nn.Identity()
        self.text_layers = nn.ModuleList(FusionLayer(config) for _ in range(config.num_layers))
        self.image_layers = nn.ModuleList(FusionLayer(config) for _ in range(config.num_layers))
        self.first_bridge = config.first_bridge
        bridged = () if config.bridge is None else range(self.first_bridge, config.num_layers + 1)
        bridge = look_up("fusion.bridge", config.bridge or "add", bridges)
        num_text, num_image = config.num_tower_layers("text"), config.num_tower_layers("vision")
        self.text_bridges = nn.ModuleList(bridge(config, layer, num_text) for layer in bridged)
        self.image_bridges = nn.ModuleList(bridge(config, layer, num_image) for layer in bridged)
        self._reads_all = not all(
            isinstance(each, Bridge) for each in (*self.text_bridges, *self.image_bridges)
        )

    def cached(
        self, modality: Literal["image", "text"], layers: TowerLayers, mask: TokenMask = None
    ) -> FirstLayerCache:
        """Returns what the first layer computes of one stream alone."""
        own: Any = self.image_layers[0] if modality == "image" else self.text_layers[0]
        other: Any = self.text_layers[0] if modality == "image" else self.image_layers[0]
        norm, bridges = getattr(self, f"{modality}_norm"), getattr(self, f"{modality}_bridges")
        stream = self._first_input(tuple(layers), norm, bridges)
        attended, query = self._checkpointed(own.attend)(stream, mask)
        return FirstLayerCache(attended, query, other.key_value(stream))

    def forward(
        self,
        image: Sequence[Float[Tensor, "b p d"]],
        text: Sequence[Float[Tensor, "b l d"]],
        text_mask: TokenMask,
        outputs: FusionOutputs,
        image_cache: FirstLayerCache | None = None,
        text_cache: FirstLayerCache | None = None,
    ) -> tuple[Float[Tensor, "b q d"], Float[Tensor, "b r d"] | None]:
        """Returns the text and the image stream, as far as `outputs` needs them: `text` has no image stream."""
        if self._reads_all:
            image, text = tuple(image), tuple(text)
        text_stream = self._first_input(text, self.text_norm, self.text_bridges)
        image_stream = self._first_input(image, self.image_norm, self.image_bridges)
        last = len(self.text_layers) - 1
        for index, (text_layer, image_layer) in enumerate(
            zip(self.text_layers, self.image_layers, strict=True)
        ):
            if index > 0:
                text_cache = image_cache = None
                if self.text_bridges:
                    number = index + 1 - self.first_bridge
                    text_bridge, image_bridge = (
                        self.text_bridges[number],
                        self.image_bridges[number],
                    )
                    text_stream, image_stream = (
                        text_bridge(text_stream, text, image_stream, None),
                        image_bridge(image_stream, image, text_stream, text_mask),
                    )
            cut = 1 if outputs == "pooled" and index == last else None
            caches = {"cache": text_cache, "other_cache": image_cache}
            run_text, run_image = self._checkpointed(text_layer), self._checkpointed(image_layer)
            text_output = run_text(
                text_stream, image_stream, mask=text_mask, num_queries=cut, **caches
            )
            if outputs == "text" and index == last:
                return text_output, None
            # Both streams read the other's *input*: neither sees the other's update of the same layer.
            caches = {"cache": image_cache, "other_cache": text_cache}
            image_stream = run_image(
                image_stream, text_stream, other_mask=text_mask, num_queries=cut, **caches
            )
            text_stream = text_output
        return text_stream, image_stream

    def _first_input(
        self, layers: TowerLayers, norm: nn.Module, bridges: nn.ModuleList
    ) -> Float[Tensor, "b l d"]:
        return bridges[0](None, layers, None, None) if self.first_bridge == 1 else norm(layers[0])

    def _checkpointed(self, layer: Any) -> Any:
        return activation_checkpointing(layer, when=self.checkpoint_activations)
