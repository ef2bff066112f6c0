"""Linear layers for a CPU: products in oneDNN where it is faster (see `products`), with weights packed for it.

An activation or a LayerNorm before a product is computed again for the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bridgetower.model.layers import GELU, FeedForward, SelfAttention, activated, is_plain
from bridgetower.model.products import onednn_is_faster
from bridgetower.model.tower_config import Activation

_NORM = "norm_of"  # attribute of a LayerNorm's output


class OneDnnLinear(nn.Linear):
    """x·Wᵀ + b, with a weight that can be packed for inference; whoever copies, moves or loads it meets a dense one."""

    def forward(self, input: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:  # noqa: A002 - torch's name
        return linear(input, self.weight, self.bias)

    def pack(self, dtype: torch.dtype) -> None:
        """Stores the weight in `dtype`, in the order in which oneDNN reads it; no rows can be taken of it then."""
        dense = _dense(self.weight.detach()).to(dtype)
        self.weight = nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(dense, None), requires_grad=False)

    @contextmanager
    def _unpacked(self) -> Iterator[None]:
        packed = self.weight.is_mkldnn
        if packed:
            self.weight = nn.Parameter(self.weight.to_dense(), requires_grad=False)
        yield
        if packed and computes(self.weight.device, self.weight.dtype):
            self.pack(self.weight.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OneDnnLinear:
        with self._unpacked():
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any) -> None:
        with self._unpacked():
            super()._load_from_state_dict(*args)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = _dense(destination[prefix + "weight"])

    def __getstate__(self) -> dict[str, Any]:
        if not self.weight.is_mkldnn:
            return vars(self)
        dense = nn.Parameter(self.weight.to_dense(), requires_grad=False)
        return vars(self) | {"_parameters": self._parameters | {"weight": dense}}


class RecomputedFeedForward(FeedForward):
    """Keeps the input of the activation for the gradients and computes its output again; works in place without."""

    def forward(self, hidden: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        up = self.up(hidden)
        if torch.is_grad_enabled():
            if is_plain(self.down, OneDnnLinear):
                return linear(up, self.down.weight, self.down.bias, self.activation)
            return self.down(activated(up, self.activation))
        return self.down((activated_ if is_plain(self.up, OneDnnLinear) else activated)(up, self.activation))


class _Norm(NamedTuple):
    """What a LayerNorm's output, in its version, was computed of."""

    version: int
    input: Tensor
    weight: Tensor
    bias: Tensor
    eps: float


class RecomputedLayerNorm(nn.LayerNorm):
    """Marks its output, so that linear layers keep the norm's input for the gradients, which the norm keeps anyway."""

    def forward(self, input: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:  # noqa: A002 - torch's name
        output = super().forward(input)
        if output.requires_grad:
            setattr(output, _NORM, _Norm(output._version, input, self.weight, self.bias, self.eps))
        return output


def linear(
    hidden: Float[Tensor, "*n i"],
    weight: Float[Tensor, "o i"],
    bias: Float[Tensor, " o"] | None,
    activation: Activation | None = None,
) -> Float[Tensor, "*n o"]:
    """Returns activation(hidden) · weightᵀ + bias; for gradients `hidden` is kept, or what a LayerNorm made it of."""
    if weight.is_mkldnn:
        hidden, bias = hidden.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
    elif not in_onednn(hidden, weight):
        inputs = hidden if activation is None else _Activated.apply(hidden, activation)  # type: ignore[no-untyped-call]
        return F.linear(inputs, weight, bias)
    if not torch.is_grad_enabled():
        return _product(_input(hidden, activation), weight, bias)
    output: Tensor = _OneDnn.apply(hidden, weight, bias, activation)  # type: ignore[no-untyped-call]
    return output


class OneDnnSelfAttention(SelfAttention):
    linear_layer, product = OneDnnLinear, staticmethod(linear)


def in_onednn(hidden: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is to compute a product: of float32 operands that are not empty, if it is faster."""
    return (
        hidden.dtype == weight.dtype == torch.float32
        and hidden.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and onednn_is_faster()
    )


def computes(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float32:
        return onednn_is_faster()
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """From oneDNN, which is slow on operands that are neither dense nor transposed."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    rows = rows if rows.T.is_contiguous() else rows.contiguous()
    output = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return output.view(*hidden.shape[:-1], weight.shape[0])


class _OneDnn(torch.autograd.Function):
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
        of_hidden = of_weight = None
        if to_hidden:
            of_hidden = _product(gradient, _dense(weight).T).view(hidden.shape)
            of_hidden = of_hidden if ctx.activation is None else activation_gradient(of_hidden, hidden, ctx.activation)
        if to_weight:
            inputs = _input(hidden, ctx.activation)
            of_weight = _product(gradient.T, inputs.reshape(-1, inputs.shape[-1]).contiguous().T)
        return of_hidden, of_weight, gradient.sum(dim=0) if to_bias else None, None


def _input(hidden: Tensor, activation: Activation | None) -> Tensor:
    return hidden if activation is None else activated(hidden, activation)


def _dense(weight: Tensor) -> Tensor:
    return weight.to_dense() if weight.is_mkldnn else weight


def activated_(hidden: Float[Tensor, "*n"], activation: Activation) -> Float[Tensor, "*n"]:
    """Like `activated` in the place of its input: new memory costs more time than the activation."""
    if activation == "quick_gelu":
        return F.silu(hidden.mul_(1.702), inplace=True).div_(1.702)
    if activation == "relu":
        return hidden.relu_()
    in_place: Tensor = torch.ops.aten.gelu_(hidden, approximate=GELU[activation])
    return in_place


def activation_gradient(
    gradient: Float[Tensor, "*n"], hidden: Float[Tensor, "*n"], activation: Activation
) -> Float[Tensor, "*n"]:
    if activation == "quick_gelu":
        return torch.ops.aten.silu_backward(gradient, 1.702 * hidden)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(gradient, hidden, 0)
    return torch.ops.aten.gelu_backward(gradient, hidden, approximate=GELU[activation])


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
