"""Scaled dot-product attention, written out on a CPU, where PyTorch's fused kernel is slower at these sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from bridgetower.model.dropout import draw_kept

# Bytes of the scores that are in work at once: enough for one product to be worth it, and still in the cache.
_BLOCK = 4 * 2**20


def attend(
    query: Float[Tensor, "b q d"],
    key: Float[Tensor, "b m d"],
    value: Float[Tensor, "b m d"],
    *,
    num_heads: int,
    mask: Bool[Tensor, "b m"] | None,
    dropout: float,
) -> Float[Tensor, "b q d"]:
    """Scaled dot-product attention over `num_heads` heads; keys where `mask` is False get no weight."""
    query, key, value = (_split_heads(tensor, num_heads) for tensor in (query, key, value))
    if query.device.type == "cpu" and not torch.compiler.is_compiling():
        context: Tensor = _WrittenOut.apply(query, key, value, mask, dropout)  # type: ignore[no-untyped-call]
    else:
        attention_mask = None if mask is None else mask[:, None, None, :]
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, dropout_p=dropout)
    return context.transpose(1, 2).flatten(2)


def _split_heads(hidden: Float[Tensor, "b l d"], num_heads: int) -> Float[Tensor, "b h l e"]:
    return hidden.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, H, L, D/H]


class _WrittenOut(torch.autograd.Function):
    """softmax(q·kᵀ / √e)·v, some heads at a time; the weights are computed again for the gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        kept = draw_kept((*query.shape[:3], key.shape[2]), dropout) if dropout else None
        ctx.save_for_backward(query, key, value, mask, kept)
        ctx.scale = 1 / (1 - dropout)
        queries, keys, values = (tensor.flatten(0, 1) for tensor in (query, key, value))  # [B·H, L, E]
        context = torch.empty_like(queries)
        for rows, weights in _weights(queries, keys, _hidden_keys(mask, query)):
            if kept is not None:
                weights.mul_(kept.flatten(0, 1)[rows].to(weights.dtype)).mul_(ctx.scale)
            torch.bmm(weights, values[rows], out=context[rows])
        return context.view_as(query)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, mask, kept = ctx.saved_tensors
        queries, keys, values, gradient = (tensor.flatten(0, 1) for tensor in (query, key, value, gradients[0]))
        to_queries, to_keys, to_values = (torch.empty_like(tensor) for tensor in (queries, keys, values))
        scale = queries.shape[-1] ** -0.5
        for rows, weights in _weights(queries, keys, _hidden_keys(mask, query)):
            to_weights = torch.bmm(gradient[rows], values[rows].mT)
            dropped = weights
            if kept is not None:
                factor = kept.flatten(0, 1)[rows].to(weights.dtype).mul_(ctx.scale)
                to_weights, dropped = to_weights.mul_(factor), weights * factor
            torch.bmm(dropped.mT, gradient[rows], out=to_values[rows])
            to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype).mul_(scale)
            torch.bmm(to_scores, keys[rows], out=to_queries[rows])
            torch.bmm(to_scores.mT, queries[rows], out=to_keys[rows])
        return to_queries.view_as(query), to_keys.view_as(key), to_values.view_as(value), None, None


def _hidden_keys(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Where a key is hidden, for each head [B·H, 1, M]."""
    return None if mask is None else ~mask.repeat_interleave(query.shape[1], dim=0)[:, None]


def _weights(queries: Tensor, keys: Tensor, hidden: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yields the attention weights of some heads of some samples at a time, all in one buffer."""
    heads, rows, columns = len(queries), queries.shape[1], keys.shape[1]
    step = max(1, min(heads, _BLOCK // max(1, rows * columns * queries.element_size())))
    buffer = queries.new_empty(step, rows, columns)
    for start in range(0, heads, step):
        block = slice(start, min(start + step, heads))
        scores = buffer[: block.stop - block.start]
        torch.baddbmm(scores, queries[block], keys[block].mT, beta=0, alpha=queries.shape[-1] ** -0.5, out=scores)
        if hidden is not None:
            scores.masked_fill_(hidden[block], -torch.inf)
        yield block, torch.softmax(scores, dim=-1, out=scores)
