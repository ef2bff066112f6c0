"""The linear layer, whose float32 products run in oneDNN on a CPU.

PyTorch gives float32 products on x86 to MKL, which uses half of the vector width of processors that are not Intel's.
oneDNN, which PyTorch brings along for bfloat16, uses all of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """x·Wᵀ + b."""

    def forward(self, input: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:  # noqa: A002 - torch's name
        """Applies the layer to the last axis."""
        return linear(input, self.weight, self.bias)


def linear(
    hidden: Float[Tensor, "*n i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None
) -> Float[Tensor, "*n o"]:
    """Returns hidden · weightᵀ + bias, like `torch.nn.functional.linear`."""
    if in_onednn(hidden, weight):
        output: Tensor = _OneDnn.apply(hidden, weight, bias)  # type: ignore[no-untyped-call]
        return output
    return F.linear(hidden, weight, bias)


def in_onednn(hidden: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is to compute a product: float32 on a CPU, in an ordinary run and not while a graph is taken."""
    return (
        hidden.dtype == weight.dtype == torch.float32
        and hidden.device.type == weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hidden.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def product(rows: Float[Tensor, "n i"], weight: Float[Tensor, "o i"], bias: Tensor | None = None) -> Tensor:
    """Returns rows · weightᵀ + bias from oneDNN, which takes both operands dense, also transposed."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


class _OneDnn(torch.autograd.Function):
    """The product and its gradients, which are products too."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = _rows(hidden)
        ctx.save_for_backward(rows, weight)
        return product(rows, weight, bias).view(*hidden.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        gradient = _rows(gradients[0])
        to_hidden, to_weight, to_bias = ctx.needs_input_grad
        return (
            product(gradient, weight.T).view(*gradients[0].shape[:-1], -1) if to_hidden else None,
            product(gradient.T, rows.T) if to_weight else None,
            gradient.sum(dim=0) if to_bias else None,
        )


def _rows(hidden: Tensor) -> Tensor:
    """All axes but the last as one; dense, as oneDNN is slow on anything else."""
    return hidden.reshape(-1, hidden.shape[-1]).contiguous()
