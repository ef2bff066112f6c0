"""The cross-modal encoder: bridges from tower layers into two streams that attend to each other."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bridgetower.model.config import BridgeKind, FusionConfig
from bridgetower.model.layers import CrossAttention, FeedForward, SelfAttention

Read = Literal["pooled", "text", "all"]


class Bridge(nn.Module):
    """Lets a tower layer into the fusion stream (paper, equation 8 and table "BridgeLayer")."""

    def __init__(self, hidden_size: int, layer_norm_eps: float, kind: BridgeKind) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        if kind == "scaled_add":
            self.scale = nn.Parameter(torch.tensor(1.0))
        elif kind == "interpolate":
            self.beta = nn.Parameter(torch.tensor(0.5))

    def forward(self, tower: Float[Tensor, "b l d"], stream: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        """Returns the next fusion layer's input from the tower layer x and the previous fusion output z."""
        if self.kind == "scaled_add":
            return self.norm(tower * self.scale + stream)
        if self.kind == "interpolate":
            return self.norm(tower * (1 - self.beta) + stream * self.beta)
        return self.norm(tower + stream)


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
        self.dropout = config.dropout

    def forward(
        self,
        hidden: Float[Tensor, "b l d"],
        other: Float[Tensor, "b m d"],
        *,
        mask: Bool[Tensor, "b l"] | None = None,
        other_mask: Bool[Tensor, "b m"] | None = None,
        num_queries: int | None = None,
    ) -> Float[Tensor, "b q d"]:
        """Returns the stream's output at its first `num_queries` positions (None: at all)."""
        queries = hidden[:, :num_queries]
        attended = self.self_attention(hidden, mask, num_queries)
        queries = self.self_attention_norm(queries + self._drop(attended))
        crossed = self.cross_attention(queries, other, other_mask)
        queries = self.cross_attention_norm(queries + self._drop(crossed))
        return self.mlp_norm(queries + self._drop(self.mlp(queries)))

    def _drop(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, self.dropout, self.training)


class FusionEncoder(nn.Module):
    """K layers of two streams; layer ℓ > 1 reads BridgeLayer(previous output, tower layer ℓ) of its modality."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.bridge_layer_norm_eps
        self.text_norm = nn.LayerNorm(width, eps=eps) if config.input_norm else nn.Identity()
        self.image_norm = nn.LayerNorm(width, eps=eps) if config.input_norm else nn.Identity()
        self.text_layers = nn.ModuleList(FusionLayer(config) for _ in range(config.num_layers))
        self.image_layers = nn.ModuleList(FusionLayer(config) for _ in range(config.num_layers))
        bridges = 0 if config.bridge is None else config.num_layers - 1
        kind: BridgeKind = config.bridge or "add"
        self.text_bridges = nn.ModuleList(Bridge(width, eps, kind) for _ in range(bridges))
        self.image_bridges = nn.ModuleList(Bridge(width, eps, kind) for _ in range(bridges))

    def forward(
        self,
        image: tuple[Float[Tensor, "b p d"], ...],
        text: tuple[Float[Tensor, "b l d"], ...],
        text_mask: Bool[Tensor, "b l"] | None,
        read: Read,
    ) -> tuple[Float[Tensor, "b q d"], Float[Tensor, "b r d"] | None]:
        """Returns the text and the image stream, as far as `read` needs them.

        `pooled` computes the last layer at the two CLS positions only, `text` leaves the last image layer out (the
        image stream is then None), `all` computes everything. What is computed does not depend on `read`.
        """
        text_stream, image_stream = self.text_norm(text[0]), self.image_norm(image[0])
        last = len(self.text_layers) - 1
        for index, (text_layer, image_layer) in enumerate(zip(self.text_layers, self.image_layers, strict=True)):
            if index > 0 and self.text_bridges:
                text_stream = self.text_bridges[index - 1](text[index], text_stream)
                image_stream = self.image_bridges[index - 1](image[index], image_stream)
            num_queries = 1 if read == "pooled" and index == last else None
            text_output = text_layer(text_stream, image_stream, mask=text_mask, num_queries=num_queries)
            if read == "text" and index == last:
                return text_output, None
            # Both streams read the other's *input*: neither sees the other's update of the same layer.
            image_stream = image_layer(image_stream, text_stream, other_mask=text_mask, num_queries=num_queries)
            text_stream = text_output
        return text_stream, image_stream
