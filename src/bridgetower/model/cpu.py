"""What makes the model fast on a CPU: the same numbers under the same names, from other kernels.

Products run in oneDNN, those of float32 where it is faster (see `products`; `benchmarks/run.py --only products` prints
both rates). Attention is written out, since PyTorch's fused kernel is slower at these sizes. Four
values of dropout share a draw. The activation in a feed-forward layer is computed again for the gradients. In
inference, some pairs are fused after others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int8
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.encodings import Encoded, Fused
from bridgetower.model.fusion import FusionOutputs
from bridgetower.model.layers import DotProductAttention, FeedForward, SelfAttention, activated
from bridgetower.model.products import onednn_is_faster
from bridgetower.model.tower_config import Activation

# Of the largest activation of a fusion layer, in inference. More pairs at once were slower: of the base model 0.116 s
# each for 32 encoded images with one text, 0.091 s for 8 (`benchmarks/run.py --only growth`).
BUFFER_BYTES = 2**25
_SCORE_BYTES = 4 * 2**20  # of attention scores in work at once: enough for one product to be worth it, and in the cache
_NORM = "norm_of"  # attribute of a LayerNorm's output
_LOWEST, _VALUES = -(2**15), 2**16  # of 16 bits


def optimize_for_cpu(module: nn.Module) -> None:
    """Swaps in the kernels of this file, for training or use on a CPU; a model elsewhere is left as it is.

    Parameters, their names and hooks stay. Modules from outside this package and PyTorch are left as they are, with all
    that is in them. What is to be exported, compiled or moved to another device must not be swapped.
    """
    parameter = next(module.parameters(), None)
    if parameter is None or parameter.device.type == "cpu":
        _swap(module)


def _swap(module: nn.Module) -> None:
    if type(module).__module__.split(".")[0] in ("bridgetower", "torch"):
        module.__class__ = _KERNELS.get(type(module), type(module))
        for child in module.children():
            _swap(child)


@torch.inference_mode(False)  # parameters made in that mode could not be loaded into another model
def pack_weights(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Swaps the kernels in and packs the weights of their linear layers, for inference.

    Each weight is stored in place of the one before in the order in which oneDNN reads it, if oneDNN computes with it
    on this processor; the state dict stays what it was. Every other parameter is copied, so that nothing holds on to a
    file that weights were mapped from. Under autocast, products stay in the number format of the packed weight.

    Args:
        model: Elsewhere than on a CPU it is left as it is.
        dtype: In which to compute the products, float32 or bfloat16; None is that of the weights.
    """
    optimize_for_cpu(model)
    for module in model.modules():
        if isinstance(module, OneDnnLinear) and _computes(module.weight.device, dtype or module.weight.dtype):
            module.pack(dtype or module.weight.dtype)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "cpu" and not parameter.is_mkldnn:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


class OneDnnLinear(nn.Linear):
    """x·Wᵀ + b, with a weight that can be packed for inference."""

    def forward(self, input: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:  # noqa: A002 - torch's name
        """Applies the layer to the last axis."""
        return linear(input, self.weight, self.bias)

    def pack(self, dtype: torch.dtype) -> None:
        """Stores the weight in `dtype`, in the order in which oneDNN reads it; no rows can be taken of it then."""
        dense = _dense(self.weight.detach()).to(dtype)
        self.weight = nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(dense, None), requires_grad=False)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = _dense(destination[prefix + "weight"])


class OneDnnSelfAttention(SelfAttention):
    """Self-attention whose projections run in oneDNN, those of some queries too."""

    def project(
        self, hidden: Float[Tensor, "b l d"], num_queries: int | None
    ) -> tuple[Float[Tensor, "b q d"], Float[Tensor, "b l d"], Float[Tensor, "b l d"]]:
        """Returns the queries of the first positions, and all keys and values."""
        if num_queries is None or self.qkv.weight.is_mkldnn:
            query, key, value = self.qkv(hidden).chunk(3, dim=-1)
            return query[:, :num_queries], key, value
        width, weight, bias = hidden.shape[-1], self.qkv.weight, self.qkv.bias
        key, value = linear(hidden, weight[width:], bias[width:]).chunk(2, dim=-1)
        return linear(hidden[:, :num_queries], weight[:width], bias[:width]), key, value


class RecomputedFeedForward(FeedForward):
    """Keeps the input of the activation for the gradients and computes its output again; works in place without."""

    def forward(self, hidden: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        """Applies the layer position by position."""
        up = self.up(hidden)
        if torch.is_grad_enabled():
            return linear(up, self.down.weight, self.down.bias, self.activation)
        return self.down(activated_(up, self.activation))


@dataclass(frozen=True)
class _Norm:
    """What a LayerNorm's output, in its version, was computed of."""

    version: int
    input: Tensor
    weight: Tensor
    bias: Tensor
    eps: float


class RecomputedLayerNorm(nn.LayerNorm):
    """Marks its output, so that linear layers keep the norm's input for the gradients, which the norm keeps anyway."""

    def forward(self, input: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:  # noqa: A002 - torch's name
        """Normalises the last axis."""
        output = super().forward(input)
        if output.requires_grad:
            setattr(output, _NORM, _Norm(output._version, input, self.weight, self.bias, self.eps))
        return output


class BlockedAttention(DotProductAttention):
    """Attention some heads at a time, whose scores stay in the cache."""

    def forward(
        self,
        query: Float[Tensor, "b q d"],
        key: Float[Tensor, "b m d"],
        value: Float[Tensor, "b m d"],
        mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b q d"]:
        """Returns softmax(q·kᵀ / √e)·v of every head, side by side; keys where `mask` is False get no weight."""
        rate = self.dropout if self.training else 0.0
        context: Tensor = _WrittenOut.apply(*map(self.split_heads, (query, key, value)), mask, rate)  # type: ignore[no-untyped-call]
        return context.transpose(1, 2).flatten(2)


class SharedDrawDropout(nn.Dropout):
    """Dropout, whose draws cost a fifth of PyTorch's."""

    def forward(self, input: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:  # noqa: A002 - torch's name
        """Sets values to 0 with probability `p` and scales the others by 1 / (1 - p), in training only."""
        if not self.training or self.p == 0:
            return input
        dropped: Tensor = _Dropout.apply(input, draw_kept(input.shape, self.p), 1 / (1 - self.p))  # type: ignore[no-untyped-call]
        return dropped


class ChunkedBridgeTower(BridgeTower):
    """Fuses some pairs after others in inference, so that activations stay small."""

    def fuse(self, image: Encoded, text: Encoded, outputs: FusionOutputs = "pooled") -> Fused:
        """See `BridgeTower.fuse`."""
        if torch.is_grad_enabled() or self.training or not image.layers or len(image) != len(text):
            return super().fuse(image, text, outputs)
        hidden = image.layers[0]
        pair_bytes = hidden.shape[1] * self.config.fusion.intermediate_size * hidden.element_size()
        at_once = max(1, BUFFER_BYTES // pair_bytes)
        parts = [slice(start, start + at_once) for start in range(0, len(image), at_once)]
        if len(parts) <= 1:
            return super().fuse(image, text, outputs)
        return Fused.cat([super(ChunkedBridgeTower, self).fuse(image[part], text[part], outputs) for part in parts])


_KERNELS: dict[type[nn.Module], type[nn.Module]] = {
    BridgeTower: ChunkedBridgeTower,
    DotProductAttention: BlockedAttention,
    FeedForward: RecomputedFeedForward,
    SelfAttention: OneDnnSelfAttention,
    nn.Dropout: SharedDrawDropout,
    nn.LayerNorm: RecomputedLayerNorm,
    nn.Linear: OneDnnLinear,
}


def linear(
    hidden: Float[Tensor, "*n i"],
    weight: Float[Tensor, "o i"],
    bias: Float[Tensor, " o"] | None,
    activation: Activation | None = None,
) -> Float[Tensor, "*n o"]:
    """Returns activation(hidden) · weightᵀ + bias, like `torch.nn.functional.linear`; the weight may be packed.

    For the gradients `hidden` alone is kept, or what a LayerNorm made it of, and the rest is computed again.
    """
    if weight.is_mkldnn:
        hidden, bias = hidden.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
    elif not in_onednn(hidden, weight):
        inputs = hidden if activation is None else _Activated.apply(hidden, activation)  # type: ignore[no-untyped-call]
        return F.linear(inputs, weight, bias)
    if not torch.is_grad_enabled():
        return _product(_input(hidden, activation), weight, bias)
    output: Tensor = _OneDnn.apply(hidden, weight, bias, activation)  # type: ignore[no-untyped-call]
    return output


def in_onednn(hidden: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is to compute a product: of float32 operands that are not empty, if it is faster."""
    return (
        hidden.dtype == weight.dtype == torch.float32
        and hidden.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and onednn_is_faster()
    )


def _computes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN is to compute products in a number format there."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float32:
        return onednn_is_faster()
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns hidden · weightᵀ + bias from oneDNN, which is slow on operands that are neither dense nor transposed."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    rows = rows if rows.T.is_contiguous() else rows.contiguous()
    output = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return output.view(*hidden.shape[:-1], weight.shape[0])


class _OneDnn(torch.autograd.Function):
    """The product and its gradients, which are products too."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
        norm: _Norm | None = getattr(hidden, _NORM, None)
        if norm is None or norm.version != hidden._version:
            ctx.save_for_backward(weight, hidden)
        else:
            ctx.save_for_backward(weight, norm.input, norm.weight, norm.bias)
            ctx.eps = norm.eps
        ctx.activation = activation
        return _product(_input(hidden, activation), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        weight, hidden, *norm = ctx.saved_tensors
        if norm:
            hidden = F.layer_norm(hidden, hidden.shape[-1:], norm[0], norm[1], ctx.eps)
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1]).contiguous()
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        return (
            _gradient_of_input(gradient, hidden, weight, ctx.activation) if to_hidden else None,
            _gradient_of_weight(gradient, _input(hidden, ctx.activation)) if to_weight else None,
            gradient.sum(dim=0) if to_bias else None,
            None,
        )


def _input(hidden: Tensor, activation: Activation | None) -> Tensor:
    """Returns what the weight is multiplied with."""
    return hidden if activation is None else activated(hidden, activation)


def _gradient_of_input(gradient: Tensor, hidden: Tensor, weight: Tensor, activation: Activation | None) -> Tensor:
    outer = _product(gradient, _dense(weight).T).view(hidden.shape)
    return outer if activation is None else activation_gradient(outer, hidden, activation)


def _gradient_of_weight(gradient: Tensor, inputs: Tensor) -> Tensor:
    return _product(gradient.T, inputs.reshape(-1, inputs.shape[-1]).contiguous().T)


def _dense(weight: Tensor) -> Tensor:
    return weight.to_dense() if weight.is_mkldnn else weight


def activated_(hidden: Float[Tensor, "*n"], activation: Activation) -> Float[Tensor, "*n"]:
    """Like `activated` in the place of its input: new memory costs more time than the activation."""
    if activation == "gelu":
        in_place: Tensor = torch.ops.aten.gelu_(hidden)
        return in_place
    return F.silu(hidden.mul_(1.702), inplace=True).div_(1.702)


def activation_gradient(
    gradient: Float[Tensor, "*n"], hidden: Float[Tensor, "*n"], activation: Activation
) -> Float[Tensor, "*n"]:
    """Returns the gradient of the input `hidden`, given that of the output."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(gradient, hidden)
    return torch.ops.aten.silu_backward(gradient, 1.702 * hidden)


class _Activated(torch.autograd.Function):
    """The activation, whose gradient takes fewer passes over memory than those of its operations."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.activation = activation
        return activated(hidden, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (hidden,) = ctx.saved_tensors
        return activation_gradient(gradients[0], hidden, ctx.activation), None


class _WrittenOut(torch.autograd.Function):
    """softmax(q·kᵀ / √e)·v, some heads at a time.

    Few weights are kept for the gradients, with copies of the inputs in which heads are dense; many are computed again.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        kept = draw_kept((*query.shape[:3], key.shape[2]), dropout) if dropout else None
        queries, keys, values = copies = [tensor.flatten(0, 1) for tensor in (query, key, value)]  # [B·H, L, E]
        stored = _room_for_weights(ctx, queries, keys)
        hidden = _hidden_keys(mask, query)
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


def _hidden_keys(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Where a key is hidden, for each head [B·H, 1, M]."""
    return None if mask is None else ~mask.repeat_interleave(query.shape[1], dim=0)[:, None]


def _room_for_weights(ctx: Any, queries: Tensor, keys: Tensor) -> Tensor | None:
    """Returns memory for the weights of all heads; None if gradients need none, or one stream is long."""
    length = max(queries.shape[1], keys.shape[1])
    if not any(ctx.needs_input_grad) or length > 2 * queries.shape[2]:  # more memory than two inputs
        return None
    return queries.new_empty(len(queries), queries.shape[1], keys.shape[1])


def _factor(kept: Tensor, rows: slice, weights: Tensor, scale: float) -> Tensor:
    """What dropout multiplies the weights of some heads with."""
    return kept.flatten(0, 1)[rows].to(weights.dtype).mul_(scale)


def _weights(
    queries: Tensor, keys: Tensor, hidden: Tensor | None, stored: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yields the attention weights of some heads of some samples at a time, all in one buffer or in `stored`."""
    blocks = _blocks(queries, keys)
    buffer = queries.new_empty(blocks[0].stop if blocks else 0, queries.shape[1], keys.shape[1])
    for rows in blocks:
        scores = buffer[: rows.stop - rows.start] if stored is None else stored[rows]
        torch.baddbmm(scores, queries[rows], keys[rows].mT, beta=0, alpha=queries.shape[-1] ** -0.5, out=scores)
        if hidden is not None:
            scores.masked_fill_(hidden[rows], -torch.inf)
        yield rows, torch.softmax(scores, dim=-1, out=scores)


def _blocks(queries: Tensor, keys: Tensor) -> list[slice]:
    """Which heads are in work at once."""
    heads, head_bytes = len(queries), queries.shape[1] * keys.shape[1] * queries.element_size()
    step = max(1, _SCORE_BYTES // max(1, head_bytes))
    return [slice(start, min(start + step, heads)) for start in range(0, heads, step)]


def draw_kept(shape: Sequence[int], rate: float) -> Int8[Tensor, "..."]:
    """Draws 1 with probability 1 - `rate`, else 0, from PyTorch's generator of the CPU.

    PyTorch draws a number of its own for each value; here, one draw of 64 bits serves four. The rate is rounded to
    multiples of 2⁻¹⁶.
    """
    count = prod(shape)
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    lowest_kept = _LOWEST + round(rate * _VALUES)
    # 1 from the lowest kept value on; comparing 16-bit integers is not vectorised, this is.
    return draws.clamp_(lowest_kept - 1, lowest_kept).sub_(lowest_kept - 1).to(torch.int8).view(*shape)


class _Dropout(torch.autograd.Function):
    """Multiplies values and gradients by kept · scale."""

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
