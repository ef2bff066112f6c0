"""The linear layer, whose float32 products run in oneDNN on a CPU.

PyTorch gives float32 products on x86 to MKL, which uses half of the vector width of processors that are not Intel's.
oneDNN, which PyTorch brings along for bfloat16, uses all of it; `benchmarks/run.py --only products` prints both rates.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bridgetower.model.activation import activated, activation_gradient
from bridgetower.model.config import Activation


class Linear(nn.Linear):
    """x·Wᵀ + b, with a weight that can be packed for inference."""

    def forward(
        self,
        input: Float[Tensor, "*n i"],  # noqa: A002 - torch's name
        activation: Activation | None = None,
    ) -> Float[Tensor, "*n o"]:
        """Applies the layer to the last axis, after the activation if one is given."""
        return linear(input, self.weight, self.bias, activation)

    @property
    def is_packed(self) -> bool:
        """Whether the weight is stored as oneDNN reads it; no rows can be taken of such a weight."""
        return self.weight.is_mkldnn

    def pack(self, dtype: torch.dtype) -> None:
        """Stores the weight in `dtype`, in the order in which oneDNN reads it; for inference on a CPU."""
        dense = _dense(self.weight.detach()).to(dtype)
        self.weight = nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(dense, None), requires_grad=False)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = _dense(destination[prefix + "weight"])


@torch.inference_mode(False)  # parameters made in that mode could not be loaded into another model
def pack_weights(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Packs the weights of linear layers for inference, if oneDNN computes with them on this processor.

    The state dict stays what it was. Each weight is packed in place of the one before; every other parameter is copied,
    so that nothing holds on to a file that weights were mapped from. Under autocast, products stay in the number format
    of the packed weight.

    Args:
        model: Elsewhere than on a CPU it is left as it is.
        dtype: In which to compute the products, float32 or bfloat16; None is that of the weights.
    """
    for module in model.modules():
        if isinstance(module, Linear) and _computes(module.weight.device, dtype or module.weight.dtype):
            module.pack(dtype or module.weight.dtype)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "cpu" and not parameter.is_mkldnn:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def linear(
    hidden: Float[Tensor, "*n i"],
    weight: Float[Tensor, "o i"],
    bias: Float[Tensor, " o"] | None,
    activation: Activation | None = None,
) -> Float[Tensor, "*n o"]:
    """Returns activation(hidden) · weightᵀ + bias, like `torch.nn.functional.linear`; the weight may be packed.

    For the gradients `hidden` alone is kept, and its activation computed again.
    """
    if weight.is_mkldnn:
        hidden, bias = hidden.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
    elif not in_onednn(hidden, weight):
        return F.linear(_input(hidden, activation), weight, bias)
    if not torch.is_grad_enabled():
        return _product(_input(hidden, activation), weight, bias)
    output: Tensor = _OneDnn.apply(hidden, weight, bias, activation)  # type: ignore[no-untyped-call]
    return output


def in_onednn(hidden: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is to compute a product: float32 on a CPU, in an ordinary run and not while a graph is taken."""
    return (
        not torch.compiler.is_compiling()  # first: what follows would cut the graph
        and hidden.dtype == weight.dtype == torch.float32
        and hidden.device.type == weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hidden.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def _computes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN computes products in a number format there."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


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
        ctx.save_for_backward(hidden, weight)
        ctx.activation = activation
        return _product(_input(hidden, activation), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
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
