"""The cross-modal encoder: bridges from tower layers into two streams that attend to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, cast

from jaxtyping import Bool, Float
from torch import Tensor, nn

from bridgetower.model.bridges import BRIDGES, Bridge, BridgeBuilder, TowerLayers
from bridgetower.model.config import FusionConfig, entry
from bridgetower.model.layers import CrossAttention, FeedForward, Output, P, SelfAttention, activation_checkpointing

FusionOutputs = Literal["pooled", "text", "all"]


class FirstLayerCache(NamedTuple):
    """What the first fusion layer computes of one stream before it meets the other; one serves many pairs.

    That is self-attention with its norm, the queries of cross-attention, and what the other stream reads of this one.
    """

    attended: Float[Tensor, "b l d"]
    query: Float[Tensor, "b l d"]
    key_value: Float[Tensor, "b l e"]


class FusionLayer(nn.Module):
    """One stream's layer: self-attention, cross-attention to the other stream's input, feed-forward; all post-norm."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width, heads, eps = config.hidden_size, config.num_heads, config.layer_norm_eps
        attention_dropout = config.dropout if config.attention_dropout is None else config.attention_dropout
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
        mask: Bool[Tensor, "b l"] | None = None,
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
        key_value = self.cross_attention.key_value(other) if other_cache is None else other_cache.key_value
        crossed = self.cross_attention(query, key_value, other_mask)
        queries = self.cross_attention_norm(attended + self.dropout(crossed))
        return self.mlp_norm(queries + self.dropout(self.mlp(queries)))

    # Of a sharded layer the weights are there while `forward`, `attend` or `key_value` runs, and gone after each.
    def key_value(self, hidden: Float[Tensor, "b l d"]) -> Float[Tensor, "b l e"]:
        return self.cross_attention.key_value(hidden)

    def _attend(
        self, hidden: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"] | None, num_queries: int | None = None
    ) -> tuple[Float[Tensor, "b q d"], Float[Tensor, "b q d"]]:
        """Returns self-attention with its norm, and the queries of cross-attention: what needs this stream only."""
        attended = self.self_attention(hidden, mask, num_queries)
        attended = self.self_attention_norm(hidden[:, :num_queries] + self.dropout(attended))
        return attended, self.cross_attention.query(attended)

    attend = _attend


class FusionEncoder(nn.Module):
    """K layers of two streams; layer ℓ > 1 reads BridgeLayer(previous output, tower layer ℓ) of its modality."""

    def __init__(self, config: FusionConfig, bridges: Mapping[str, BridgeBuilder] = BRIDGES) -> None:
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
        bridge = entry("fusion.bridge", config.bridge or "add", bridges)
        num_text, num_image = config.num_tower_layers("text"), config.num_tower_layers("vision")
        self.text_bridges = nn.ModuleList(bridge(config, layer, num_text) for layer in bridged)
        self.image_bridges = nn.ModuleList(bridge(config, layer, num_image) for layer in bridged)
        self._reads_all = not all(isinstance(each, Bridge) for each in (*self.text_bridges, *self.image_bridges))

    def cached(
        self, modality: Literal["image", "text"], layers: TowerLayers, mask: Bool[Tensor, "b l"] | None = None
    ) -> FirstLayerCache:
        """Returns what the first layer computes of one stream alone."""
        if modality == "image":
            norm, bridges, own, other = self.image_norm, self.image_bridges, self.image_layers[0], self.text_layers[0]
        else:
            norm, bridges, own, other = self.text_norm, self.text_bridges, self.text_layers[0], self.image_layers[0]
        stream = self._first_input(tuple(layers), norm, bridges)
        attended, query = self._checkpointed(cast(FusionLayer, own).attend)(stream, mask)
        return FirstLayerCache(attended, query, cast(FusionLayer, other).key_value(stream))

    def forward(
        self,
        image: Sequence[Float[Tensor, "b p d"]],
        text: Sequence[Float[Tensor, "b l d"]],
        text_mask: Bool[Tensor, "b l"] | None,
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
        for index, (text_layer, image_layer) in enumerate(zip(self.text_layers, self.image_layers, strict=True)):
            if index > 0:
                text_cache = image_cache = None
                if self.text_bridges:
                    number = index + 1 - self.first_bridge
                    text_bridge, image_bridge = self.text_bridges[number], self.image_bridges[number]
                    text_stream, image_stream = (
                        text_bridge(text_stream, text, image_stream, None),
                        image_bridge(image_stream, image, text_stream, text_mask),
                    )
            cut = 1 if outputs == "pooled" and index == last else None
            caches = {"cache": text_cache, "other_cache": image_cache}
            run_text, run_image = self._checkpointed(text_layer), self._checkpointed(image_layer)
            text_output = run_text(text_stream, image_stream, mask=text_mask, num_queries=cut, **caches)
            if outputs == "text" and index == last:
                return text_output, None
            # Both streams read the other's *input*: neither sees the other's update of the same layer.
            caches = {"cache": image_cache, "other_cache": text_cache}
            image_stream = run_image(image_stream, text_stream, other_mask=text_mask, num_queries=cut, **caches)
            text_stream = text_output
        return text_stream, image_stream

    def _first_input(self, layers: TowerLayers, norm: nn.Module, bridges: nn.ModuleList) -> Float[Tensor, "b l d"]:
        return bridges[0](None, layers, None, None) if self.first_bridge == 1 else norm(layers[0])

    def _checkpointed(self, layer: Callable[P, Output]) -> Callable[P, Output]:
        return activation_checkpointing(layer, when=self.checkpoint_activations)
