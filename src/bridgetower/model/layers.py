"""Building blocks that the towers and the fusion encoder share: attention, feed-forward, transformer layers."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bridgetower.model.activation import activated_
from bridgetower.model.attention import attend
from bridgetower.model.config import Activation
from bridgetower.model.dropout import dropout
from bridgetower.model.linear import Linear, linear


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection for query, key and value."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.out = Linear(hidden_size, hidden_size)

    def forward(
        self, hidden: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"] | None = None, num_queries: int | None = None
    ) -> Float[Tensor, "b q d"]:
        """Attends from the first `num_queries` positions (None: all) to every position where `mask` is True."""
        if num_queries is None or self.qkv.is_packed:
            query, key, value = self.qkv(hidden).chunk(3, dim=-1)
            query = query[:, :num_queries]
        else:
            width = hidden.shape[-1]
            query = linear(hidden[:, :num_queries], self.qkv.weight[:width], self.qkv.bias[:width])
            key, value = linear(hidden, self.qkv.weight[width:], self.qkv.bias[width:]).chunk(2, dim=-1)
        rate = self.dropout if self.training else 0.0
        return self.out(attend(query, key, value, num_heads=self.num_heads, mask=mask, dropout=rate))


class CrossAttention(nn.Module):
    """Multi-head attention from one stream to the other, key and value fused."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = Linear(hidden_size, hidden_size)
        self.key_value = Linear(hidden_size, 2 * hidden_size)
        self.out = Linear(hidden_size, hidden_size)

    def forward(
        self, hidden: Float[Tensor, "b q d"], other: Float[Tensor, "b m d"], mask: Bool[Tensor, "b m"] | None = None
    ) -> Float[Tensor, "b q d"]:
        """Attends from every position of `hidden` to the positions of `other` where `mask` is True."""
        return self.attend(self.query(hidden), self.key_value(other), mask)

    def attend(
        self, query: Float[Tensor, "b q d"], key_value: Float[Tensor, "b m e"], mask: Bool[Tensor, "b m"] | None
    ) -> Float[Tensor, "b q d"]:
        """Attends with the outputs of the layers `query` and `key_value`."""
        key, value = key_value.chunk(2, dim=-1)
        rate = self.dropout if self.training else 0.0
        return self.out(attend(query, key, value, num_heads=self.num_heads, mask=mask, dropout=rate))


class FeedForward(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Activation = "gelu") -> None:
        super().__init__()
        self.up = Linear(hidden_size, intermediate_size)
        self.down = Linear(intermediate_size, hidden_size)
        self.activation = activation

    def forward(self, hidden: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        """Applies the layer position by position."""
        up = self.up(hidden)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.down(up, self.activation)
        return self.down(activated_(up, self.activation))


class PreNormLayer(nn.Module):
    """A ViT block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, hidden_size: int, num_heads: int, intermediate_size: int, layer_norm_eps: float, activation: Activation
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.attention = SelfAttention(hidden_size, num_heads)
        self.mlp_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.mlp = FeedForward(hidden_size, intermediate_size, activation)

    def forward(self, hidden: Float[Tensor, "b p d"], num_queries: int | None = None) -> Float[Tensor, "b q d"]:
        """Returns the block's output at its first `num_queries` positions (None: at all)."""
        attended = self.attention(self.attention_norm(hidden), num_queries=num_queries)
        hidden = hidden[:, :num_queries] + attended
        return hidden + self.mlp(self.mlp_norm(hidden))


class PostNormLayer(nn.Module):
    """A BERT layer: norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(
        self, hidden_size: int, num_heads: int, intermediate_size: int, layer_norm_eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(hidden_size, num_heads, dropout)
        self.attention_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.mlp = FeedForward(hidden_size, intermediate_size)
        self.mlp_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.dropout = dropout

    def forward(
        self, hidden: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"] | None = None, num_queries: int | None = None
    ) -> Float[Tensor, "b q d"]:
        """Returns the layer's output at its first `num_queries` positions (None: at all).

        Positions where `mask` is False are not attended to.
        """
        attended = self.attention(hidden, mask, num_queries)
        hidden = self.attention_norm(hidden[:, :num_queries] + self._drop(attended))
        return self.mlp_norm(hidden + self._drop(self.mlp(hidden)))

    def _drop(self, hidden: Tensor) -> Tensor:
        return dropout(hidden, self.dropout, self.training)


class Pooler(nn.Module):
    """tanh(Linear(CLS))."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = Linear(hidden_size, hidden_size)

    def forward(self, hidden: Float[Tensor, "b l d"]) -> Float[Tensor, "b d"]:
        """Reads the first position only."""
        return torch.tanh(self.dense(hidden[:, 0]))
