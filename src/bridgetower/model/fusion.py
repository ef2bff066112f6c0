"""The cross-modal encoder: bridges from tower layers into two streams that attend to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bridgetower.model.config import FusionConfig, entry
from bridgetower.model.layers import CrossAttention, FeedForward, Output, P, SelfAttention, activation_checkpointing

FusionOutputs = Literal["pooled", "text", "all"]


class Bridge(nn.Module):
    """Lets tower layers into a fusion stream (paper, equation 8 and table "BridgeLayer"): LayerNorm(x + z)."""

    def __init__(self, config: FusionConfig, layer: int) -> None:
        """Makes the bridge into a fusion layer, counted from 1; there is none into the first."""
        super().__init__()
        self.layer = layer
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.bridge_layer_norm_eps)

    def forward(
        self,
        stream: Float[Tensor, "b l d"],
        tower_layers: tuple[Float[Tensor, "b l d"], ...],
        other_stream: Float[Tensor, "b m d"],
    ) -> Float[Tensor, "b l d"]:
        """Returns the fusion layer's input.

        Args:
            stream: The previous fusion layer's output z.
            tower_layers: All bridged hidden states of the stream's tower, projected; x is that of this fusion layer.
            other_stream: The other stream's z.
        """
        return self.norm(self.mixed(stream, tower_layers[self.layer - 1]))

    def mixed(self, stream: Float[Tensor, "b l d"], tower: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        """Returns what the LayerNorm reads."""
        return tower + stream


class ScaledAddBridge(Bridge):
    """LayerNorm(αx + z), α learned."""

    def __init__(self, config: FusionConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def mixed(self, stream: Float[Tensor, "b l d"], tower: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        """Returns αx + z."""
        return tower * self.scale + stream


class InterpolatingBridge(Bridge):
    """LayerNorm((1 - β)x + βz), β learned."""

    def __init__(self, config: FusionConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.beta = nn.Parameter(torch.tensor(0.5))

    def mixed(self, stream: Float[Tensor, "b l d"], tower: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        """Returns (1 - β)x + βz."""
        return tower * (-self.beta + 1) + stream * self.beta  # not 1 - beta, which PyTorch 2.6 does not export


class NormBridge(Bridge):
    """LayerNorm(z): reads no tower layer."""

    def forward(
        self,
        stream: Float[Tensor, "b l d"],
        tower_layers: tuple[Float[Tensor, "b l d"], ...],
        other_stream: Float[Tensor, "b m d"],
    ) -> Float[Tensor, "b l d"]:
        """Returns the fusion layer's input."""
        return self.norm(stream)


BridgeBuilder = Callable[[FusionConfig, int], nn.Module]
BRIDGES: dict[str, BridgeBuilder] = {
    "add": Bridge,
    "scaled_add": ScaledAddBridge,
    "interpolate": InterpolatingBridge,
    "norm": NormBridge,
}


@dataclass(frozen=True)
class FirstLayerCache:
    """What the first fusion layer computes of one stream before it meets the other; one serves many pairs.

    Attributes:
        attended: Self-attention and its norm [B, L, D].
        query: The stream's cross-attention queries [B, L, D].
        key_value: What the other stream's cross-attention reads of this one [B, L, 2D].
    """

    attended: Float[Tensor, "b l d"]
    query: Float[Tensor, "b l d"]
    key_value: Float[Tensor, "b l e"]

    def map(self, function: Callable[[Tensor], Tensor]) -> FirstLayerCache:
        """Applies `function` to every tensor."""
        return FirstLayerCache(function(self.attended), function(self.query), function(self.key_value))

    @staticmethod
    def cat(parts: Sequence[FirstLayerCache]) -> FirstLayerCache:
        """Joins batches of equally long streams."""
        attended = torch.cat([part.attended for part in parts])
        query = torch.cat([part.query for part in parts])
        return FirstLayerCache(attended, query, torch.cat([part.key_value for part in parts]))


class FusionLayer(nn.Module):
    """One stream's layer: self-attention, cross-attention to the other stream's input, feed-forward; all post-norm."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width, heads, eps = config.hidden_size, config.num_heads, config.layer_norm_eps
        self.self_attention = SelfAttention(width, heads, config.dropout)
        self.self_attention_norm = nn.LayerNorm(width, eps=eps)
        self.cross_attention = CrossAttention(width, heads, config.dropout)
        self.cross_attention_norm = nn.LayerNorm(width, eps=eps)
        self.mlp = FeedForward(width, config.intermediate_size)
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
        """Returns the stream's output at its first `num_queries` positions (None: at all).

        A cache stands for what this method would compute of one of the streams alone.
        """
        if cache is None:
            attended = self._attend_self(hidden, mask, num_queries)
            query = self.cross_attention.query(attended)
        else:
            attended, query = cache.attended[:, :num_queries], cache.query[:, :num_queries]
        key_value = self.cross_attention.key_value(other) if other_cache is None else other_cache.key_value
        crossed = self.cross_attention(query, key_value, other_mask)
        queries = self.cross_attention_norm(attended + self.dropout(crossed))
        return self.mlp_norm(queries + self.dropout(self.mlp(queries)))

    def cache(
        self, hidden: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"] | None, *, reader: FusionLayer
    ) -> FirstLayerCache:
        """Returns what needs this stream only; `reader` is the other stream's layer."""
        attended = self._attend_self(hidden, mask)
        return FirstLayerCache(attended, self.cross_attention.query(attended), reader.cross_attention.key_value(hidden))

    def _attend_self(self, hidden: Tensor, mask: Tensor | None, num_queries: int | None = None) -> Tensor:
        attended = self.self_attention(hidden, mask, num_queries)
        return self.self_attention_norm(hidden[:, :num_queries] + self.dropout(attended))


class FusionEncoder(nn.Module):
    """K layers of two streams; layer ℓ > 1 reads BridgeLayer(previous output, tower layer ℓ) of its modality."""

    def __init__(self, config: FusionConfig, bridges: Mapping[str, BridgeBuilder] = BRIDGES) -> None:
        """Builds the layers, and the bridge that the config names into each layer but the first.

        Raises:
            ValueError: It names another one.
        """
        super().__init__()
        self.checkpoint_activations = False
        width, eps = config.hidden_size, config.bridge_layer_norm_eps
        self.text_norm = nn.LayerNorm(width, eps=eps) if config.input_norm else nn.Identity()
        self.image_norm = nn.LayerNorm(width, eps=eps) if config.input_norm else nn.Identity()
        self.text_layers = nn.ModuleList(FusionLayer(config) for _ in range(config.num_layers))
        self.image_layers = nn.ModuleList(FusionLayer(config) for _ in range(config.num_layers))
        bridged = () if config.bridge is None else range(2, config.num_layers + 1)
        bridge = entry("fusion.bridge", config.bridge or "add", bridges)
        self.text_bridges = nn.ModuleList(bridge(config, layer) for layer in bridged)
        self.image_bridges = nn.ModuleList(bridge(config, layer) for layer in bridged)

    def cache_text(self, first: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"] | None) -> FirstLayerCache:
        """Returns what the first layer computes of texts alone, from the first bridged layer."""
        text_layer, image_layer = self._layers(0)
        return self._checkpointed(text_layer.cache)(self.text_norm(first), mask, reader=image_layer)

    def cache_image(self, first: Float[Tensor, "b p d"]) -> FirstLayerCache:
        """Returns what the first layer computes of images alone, from the first bridged layer."""
        text_layer, image_layer = self._layers(0)
        return self._checkpointed(image_layer.cache)(self.image_norm(first), None, reader=text_layer)

    def forward(
        self,
        image: tuple[Float[Tensor, "b p d"], ...],
        text: tuple[Float[Tensor, "b l d"], ...],
        text_mask: Bool[Tensor, "b l"] | None,
        outputs: FusionOutputs,
        image_cache: FirstLayerCache | None = None,
        text_cache: FirstLayerCache | None = None,
    ) -> tuple[Float[Tensor, "b q d"], Float[Tensor, "b r d"] | None]:
        """Returns the text and the image stream, as far as `outputs` needs them.

        `pooled` computes the last layer at the two CLS positions only, `text` leaves the last image layer out (the
        image stream is then None), `all` computes everything. What is computed does not depend on `outputs`, nor on
        whether the caches were given.
        """
        text_stream, image_stream = self.text_norm(text[0]), self.image_norm(image[0])
        last = len(self.text_layers) - 1
        for index, (text_layer, image_layer) in enumerate(zip(self.text_layers, self.image_layers, strict=True)):
            if index > 0:
                text_cache = image_cache = None
                if self.text_bridges:
                    text_bridge, image_bridge = self.text_bridges[index - 1], self.image_bridges[index - 1]
                    text_stream, image_stream = (
                        text_bridge(text_stream, text, image_stream),
                        image_bridge(image_stream, image, text_stream),
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

    def _checkpointed(self, layer: Callable[P, Output]) -> Callable[P, Output]:
        return activation_checkpointing(layer, when=self.checkpoint_activations)

    def _layers(self, index: int) -> tuple[FusionLayer, FusionLayer]:
        """The text and the image stream's layer."""
        return cast(FusionLayer, self.text_layers[index]), cast(FusionLayer, self.image_layers[index])
