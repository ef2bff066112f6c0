"""The fusion encoder: encodings of both towers, which can be indexed and joined, to fused pairs."""

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
    Hidden,
    Queries,
    SelfAttention,
    TokenMask,
    TowerVector,
    activation_checkpointing,
)

Modality = Literal["image", "text"]
FusionOutputs = Literal["pooled", "text", "all"]
FusionAttention = Literal["image self", "text self", "image to text", "text to image"]
"""Attention in a fusion layer: within a stream, and from the positions of one stream to those of the other."""
Index = Int[Tensor, " n"] | Bool[Tensor, " b"] | slice
Mask = Int[Tensor, "b l"] | Bool[Tensor, "b l"] | None


class FirstLayerCache(NamedTuple):
    """Values of the first fusion layer that depend on one stream only, so that one serves many pairs.

    Attributes:
        attended: Self-attention with its norm.
        query: Queries of cross-attention.
        key_value: Keys and values that the other stream reads.
    """

    attended: Hidden
    query: Hidden
    key_value: Float[Tensor, "b l e"]


class IndexedLayers(Sequence[Tensor]):
    """Rows of the layers of an encoding, of which each is copied when it is read and not kept."""

    def __init__(self, layers: Sequence[Hidden], rows: Int[Tensor, " n"]) -> None:
        self.layers: Sequence[Tensor] = layers
        self.rows: Tensor = rows
        if isinstance(layers, IndexedLayers):
            self.layers = layers.layers
            self.rows = layers.rows[rows]

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return IndexedLayers(self.layers[index], self.rows)
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

    layers: Sequence[Hidden]
    cls: TowerVector
    mask: Bool[Tensor, "b l"] | None = None
    first_layer_cache: FirstLayerCache | None = None

    def __len__(self) -> int:
        return len(self.cls)

    def __getitem__(self, index: Index) -> Encoded:
        """Selects samples, of which an index may repeat some, so that one encoding serves many pairs."""
        if isinstance(index, slice) and not isinstance(self.layers, IndexedLayers):
            return self.map(lambda tensor: tensor[index])
        rows = torch.arange(len(self), device=self.cls.device)[index]
        layers = IndexedLayers(self.layers, rows)
        return self.map(lambda tensor: tensor[rows], layers)

    def map(
        self, function: Callable[[Tensor], Tensor], layers: Sequence[Tensor] | None = None
    ) -> Encoded:
        """Applies a function to all tensors, or to all but the layers if these are passed."""
        mask = self.mask
        cache = self.first_layer_cache
        return Encoded(
            tuple(map(function, self.layers)) if layers is None else layers,
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
            is_mask = tensor.dtype == torch.bool  # else the CLS
            return F.pad(tensor, (0, missing)) if is_mask else tensor

        return replace(self, mask=mask).map(pad)

    @staticmethod
    def cat(batches: Sequence[Encoded]) -> Encoded:
        """Joins batches along samples, padding texts of different lengths to the longest."""
        if not batches:
            raise ValueError("no encodings given; expected at least one")
        lengths = {batch.layers[0].shape[1] for batch in batches if batch.layers}
        if len(lengths) > 1 or any(batch.mask is not None for batch in batches):
            batches = [batch.padded(max(lengths)) for batch in batches]
        masks = [batch.mask for batch in batches if batch.mask is not None]
        caches = [batch.first_layer_cache for batch in batches if batch.first_layer_cache]
        cache = None
        if len(caches) == len(batches):
            cache = FirstLayerCache(*map(torch.cat, zip(*caches, strict=True)))
        layers = zip(*(batch.layers for batch in batches), strict=True)
        return Encoded(
            tuple(map(torch.cat, layers)),
            torch.cat([batch.cls for batch in batches]),
            torch.cat(masks) if masks else None,
            cache,
        )


_NOT_COMPUTED = cast(Tensor, None)  # callers know which outputs they chose and need no checks


class Fused(NamedTuple):
    """Outputs of the fusion encoder. Those that the caller did not choose are None.

    Attributes:
        text: The text stream, of outputs `text` and `all`.
        image: The image stream, of `all`.
        pooled: The pooled outputs of text and image side by side, of `pooled` and `all`.
    """

    text: Hidden = _NOT_COMPUTED
    image: Float[Tensor, "b p d"] = _NOT_COMPUTED
    pooled: Float[Tensor, "b e"] = _NOT_COMPUTED


class FusionLayer(nn.Module):
    """One stream's layer: self-attention, cross-attention to the other stream's input, feed-forward, all post-norm."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        eps = config.layer_norm_eps
        dropout = config.dropout if config.attention_dropout is None else config.attention_dropout
        self.self_attention = SelfAttention(width, config.num_heads, dropout)
        self.self_attention_norm = nn.LayerNorm(width, eps=eps)
        self.cross_attention = CrossAttention(width, config.num_heads, dropout)
        self.cross_attention_norm = nn.LayerNorm(width, eps=eps)
        self.mlp = FeedForward(width, config.intermediate_size, config.activation)
        self.mlp_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden: Hidden,
        other: Float[Tensor, "b m d"],
        *,
        mask: TokenMask = None,
        other_mask: Bool[Tensor, "b m"] | None = None,
        num_queries: int | None = None,
        cache: FirstLayerCache | None = None,
        other_cache: FirstLayerCache | None = None,
    ) -> Queries:
        """Returns the stream's output, with what a cache holds of one of the streams."""
        if cache is None:
            attended, query = self._attend(hidden, mask, num_queries)
        else:
            attended = cache.attended[:, :num_queries]
            query = cache.query[:, :num_queries]
        if other_cache is None:
            key_value = self.cross_attention.key_value(other)
        else:
            key_value = other_cache.key_value
        crossed = self.cross_attention(query, key_value, other_mask)
        queries = self.cross_attention_norm(attended + self.dropout(crossed))
        return self.mlp_norm(queries + self.dropout(self.mlp(queries)))

    # FSDP gathers the weights of a layer for one call of `forward`, `attend` or `key_value`, and frees them after it.
    # So `forward` calls none of these, but `_attend`, of which FSDP does not know.
    def key_value(self, hidden: Hidden) -> Float[Tensor, "b l e"]:
        return self.cross_attention.key_value(hidden)

    def _attend(
        self, hidden: Hidden, mask: TokenMask, num_queries: int | None = None
    ) -> tuple[Queries, Queries]:
        """Returns self-attention with its norm, and the queries of cross-attention."""
        attended = self.self_attention(hidden, mask, num_queries)
        attended = self.self_attention_norm(hidden[:, :num_queries] + self.dropout(attended))
        return attended, self.cross_attention.query(attended)

    attend = _attend


class FusionEncoder(nn.Module):
    """K layers of two streams, where layer ℓ > 1 reads BridgeLayer(previous output, tower layer ℓ) of its modality."""

    def __init__(
        self, config: FusionConfig, bridges: Mapping[str, BridgeBuilder] = BRIDGES
    ) -> None:
        super().__init__()
        self.checkpoint_activations = False
        self.first_bridge = config.first_bridge
        width = config.hidden_size
        eps = config.bridge_layer_norm_eps
        has_norms = config.input_norm and config.first_bridge > 1
        self.text_norm = nn.LayerNorm(width, eps=eps) if has_norms else nn.Identity()
        self.image_norm = nn.LayerNorm(width, eps=eps) if has_norms else nn.Identity()
        self.text_layers = nn.ModuleList(FusionLayer(config) for _ in range(config.num_layers))
        self.image_layers = nn.ModuleList(FusionLayer(config) for _ in range(config.num_layers))

        self.text_bridges = nn.ModuleList()
        self.image_bridges = nn.ModuleList()
        if config.bridge is not None:
            build = look_up("fusion.bridge", config.bridge, bridges)
            num_text = config.num_tower_layers("text")
            num_image = config.num_tower_layers("vision")
            for layer in range(self.first_bridge, config.num_layers + 1):
                self.text_bridges.append(build(config, layer, num_text))
                self.image_bridges.append(build(config, layer, num_image))
        self._reads_layers_once = all(
            isinstance(bridge, Bridge) for bridge in (*self.text_bridges, *self.image_bridges)
        )

    def attentions(self, number: int) -> dict[FusionAttention, nn.Module]:
        """Returns each `DotProductAttention` of a layer of both streams, counted from 1."""
        image: Any = self.image_layers[number - 1]
        text: Any = self.text_layers[number - 1]
        return {
            "image self": image.self_attention.attention,
            "text self": text.self_attention.attention,
            "image to text": image.cross_attention.attention,
            "text to image": text.cross_attention.attention,
        }

    def cache_first_layer(
        self, modality: Modality, layers: TowerLayers, mask: TokenMask = None
    ) -> FirstLayerCache:
        """Returns what the first layer computes of one stream alone."""
        other: Modality = "text" if modality == "image" else "image"
        layer = getattr(self, f"{modality}_layers")[0]
        other_layer = getattr(self, f"{other}_layers")[0]
        stream = self._first_input(modality, tuple(layers))
        attended, query = self._checkpointed(layer.attend)(stream, mask)
        return FirstLayerCache(attended, query, other_layer.key_value(stream))

    def forward(
        self,
        image: Sequence[Float[Tensor, "b p d"]],
        text: Sequence[Hidden],
        text_mask: TokenMask,
        outputs: FusionOutputs,
        image_cache: FirstLayerCache | None = None,
        text_cache: FirstLayerCache | None = None,
    ) -> tuple[Queries, Float[Tensor, "b r d"] | None]:
        """Returns the text and the image stream, as far as `outputs` needs them: `text` has no image stream."""
        if not self._reads_layers_once:
            image = tuple(image)
            text = tuple(text)
        text_stream = self._first_input("text", text)
        image_stream = self._first_input("image", image)
        last = len(self.text_layers) - 1
        for index, (text_layer, image_layer) in enumerate(
            zip(self.text_layers, self.image_layers, strict=True)
        ):
            # The bridges, each of which reads both streams as the previous layers left them.
            if index > 0:
                text_cache = image_cache = None
            if index > 0 and self.text_bridges:
                text_bridge = self.text_bridges[index + 1 - self.first_bridge]
                image_bridge = self.image_bridges[index + 1 - self.first_bridge]
                bridged_text = text_bridge(text_stream, text, image_stream, None)
                image_stream = image_bridge(image_stream, image, text_stream, text_mask)
                text_stream = bridged_text

            # The layers, of which each reads the *input* of the other.
            num_queries = 1 if outputs == "pooled" and index == last else None
            text_output = self._checkpointed(text_layer)(
                text_stream,
                image_stream,
                mask=text_mask,
                num_queries=num_queries,
                cache=text_cache,
                other_cache=image_cache,
            )
            if outputs == "text" and index == last:
                return text_output, None
            image_stream = self._checkpointed(image_layer)(
                image_stream,
                text_stream,
                other_mask=text_mask,
                num_queries=num_queries,
                cache=image_cache,
                other_cache=text_cache,
            )
            text_stream = text_output
        return text_stream, image_stream

    def _first_input(self, modality: Modality, layers: TowerLayers) -> Hidden:
        if self.first_bridge == 1:
            bridge = getattr(self, f"{modality}_bridges")[0]
            return bridge(None, layers, None, None)
        norm = getattr(self, f"{modality}_norm")
        return norm(layers[0])

    def _checkpointed(self, layer: Any) -> Any:
        return activation_checkpointing(layer, when=self.checkpoint_activations)
