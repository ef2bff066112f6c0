"""Attention and dropout for a CPU, in less time: PyTorch's fused kernel is slower at these sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bridgetower.model.layers import DotProductAttention

# Of attention scores in work at once, for each thread: enough for one product to be worth it, and in the cache.
_SCORE_BYTES = 2 * 2**20
_LOWEST, _VALUES = -(2**15), 2**16  # of 16 bits


class BlockedAttention(DotProductAttention):
    """Attention some heads at a time, whose scores stay in the cache."""

    def forward(
        self,
        query: Float[Tensor, "b q d"],
        key: Float[Tensor, "b m d"],
        value: Float[Tensor, "b m d"],
        mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b q d"]:
        rate = self.dropout if self.training else 0.0
        context: Tensor = _WrittenOut.apply(*map(self.split_heads, (query, key, value)), mask, rate)  # type: ignore[no-untyped-call]
        return context.transpose(1, 2).flatten(2)


class SharedDrawDropout(nn.Dropout):
    """Dropout, whose draws cost a fifth of PyTorch's."""

    def forward(self, input: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:  # noqa: A002 - torch's name
        if not self.training or self.p == 0:
            return input
        dropped: Tensor = _Dropout.apply(input, draw_kept(input.shape, self.p), 1 / (1 - self.p))  # type: ignore[no-untyped-call]
        return dropped


class _WrittenOut(torch.autograd.Function):
    """softmax(q·kᵀ / √e)·v, some heads at a time; few weights are kept for the gradients, many computed again."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        kept = draw_kept((*query.shape[:3], key.shape[2]), dropout) if dropout else None
        queries, keys, values = copies = [tensor.flatten(0, 1) for tensor in (query, key, value)]  # [B·H, L, E]
        length, stored = max(queries.shape[1], keys.shape[1]), None
        if any(ctx.needs_input_grad) and length <= 2 * queries.shape[2]:  # longer ones need more memory than two inputs
            stored = queries.new_empty(len(queries), queries.shape[1], keys.shape[1])
        hidden = None if mask is None else ~mask.repeat_interleave(query.shape[1], dim=0)[:, None]  # [B·H, 1, M]
        inputs = (query, key, value) if stored is None else (copy.unflatten(0, query.shape[:2]) for copy in copies)
        ctx.save_for_backward(*inputs, hidden, kept, stored)
        ctx.scale = 1 / (1 - dropout)
        context = torch.empty_like(queries)
        for rows, weights in _weights(queries, keys, hidden, stored):
            dropped = weights if kept is None else _factor(kept, rows, weights, ctx.scale).mul_(weights)
            torch.bmm(dropped, values[rows], out=context[rows])
        return context.view_as(query)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        *inputs, hidden, kept, stored = ctx.saved_tensors
        queries, keys, values, gradient = (tensor.flatten(0, 1) for tensor in (*inputs, gradients[0]))
        to_queries, to_keys, to_values = (torch.empty_like(tensor) for tensor in (queries, keys, values))
        scale = queries.shape[-1] ** -0.5
        known = None if stored is None else ((rows, stored[rows]) for rows in _blocks(queries, keys))
        for rows, weights in known or _weights(queries, keys, hidden):
            to_weights = torch.bmm(gradient[rows], values[rows].mT)
            dropped = weights
            if kept is not None:
                factor = _factor(kept, rows, weights, ctx.scale)
                to_weights, dropped = to_weights.mul_(factor), factor.mul_(weights)
            torch.bmm(dropped.mT, gradient[rows], out=to_values[rows])
            to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype).mul_(scale)
            torch.bmm(to_scores, keys[rows], out=to_queries[rows])
            torch.bmm(to_scores.mT, queries[rows], out=to_keys[rows])
        heads = gradients[0].shape[:2]
        return *(each.unflatten(0, heads) for each in (to_queries, to_keys, to_values)), None, None


def _factor(kept: Tensor, rows: slice, weights: Tensor, scale: float) -> Tensor:
    return kept.flatten(0, 1)[rows].to(weights.dtype).mul_(scale)


def _weights(
    queries: Tensor, keys: Tensor, hidden: Tensor | None, stored: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yields the attention weights of some heads of some samples at a time, all in one buffer or in `stored`."""
    blocks = _blocks(queries, keys)
    size = blocks[0].stop if blocks else 0
    room = queries.new_empty(size, queries.shape[1], keys.shape[1]) if stored is None else stored
    for rows in blocks:
        scores = room[: rows.stop - rows.start] if stored is None else room[rows]
        torch.baddbmm(scores, queries[rows], keys[rows].mT, beta=0, alpha=queries.shape[-1] ** -0.5, out=scores)
        if hidden is not None:
            scores.masked_fill_(hidden[rows], -torch.inf)
        yield rows, torch.softmax(scores, dim=-1, out=scores)


def _blocks(queries: Tensor, keys: Tensor) -> list[slice]:
    heads, head_bytes = len(queries), queries.shape[1] * keys.shape[1] * queries.element_size()
    step = max(1, _SCORE_BYTES * torch.get_num_threads() // max(1, head_bytes))
    return [slice(start, min(start + step, heads)) for start in range(0, heads, step)]


def draw_kept(shape: Sequence[int], rate: float) -> Int8[Tensor, "..."]:
    """Draws 1 with probability 1 - `rate`, rounded to 2⁻¹⁶, else 0; one draw of 64 bits serves four values."""
    if not 0 < round(rate * _VALUES) < _VALUES:
        return torch.empty(*shape, dtype=torch.int8).bernoulli_(1 - rate)
    count = prod(shape)
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    lowest_kept = _LOWEST + round(rate * _VALUES)
    # 1 from the lowest kept value on; comparing 16-bit integers is not vectorised, this is.
    return draws.clamp_(lowest_kept - 1, lowest_kept).sub_(lowest_kept - 1).to(torch.int8).view(*shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return kept.to(hidden.dtype).mul_(hidden).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return kept.to(gradients[0].dtype).mul_(gradients[0]).mul_(ctx.scale), None, None
