"""Activations of feed-forward layers: GELU, and the approximation of it that CLIP was trained with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bridgetower.model.config import Activation


def activated(hidden: Float[Tensor, "*n"], activation: Activation) -> Float[Tensor, "*n"]:
    """Returns the activation of each value; `quick_gelu` is x·σ(1.702x)."""
    if activation == "gelu":
        return F.gelu(hidden)
    return F.silu(1.702 * hidden) / 1.702  # keeps one tensor for the gradient, where the formula keeps two


def activated_(hidden: Float[Tensor, "*n"], activation: Activation) -> Float[Tensor, "*n"]:
    """The same in the place of its input: on a CPU new memory costs more time than the activation."""
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
