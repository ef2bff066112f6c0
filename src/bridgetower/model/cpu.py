"""What makes the model fast on a CPU: the same numbers under the same names, from other kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.cpu_attention import BlockedAttention, SharedDrawDropout
from bridgetower.model.cpu_linear import (
    OneDnnLinear,
    OneDnnSelfAttention,
    RecomputedFeedForward,
    RecomputedLayerNorm,
    computes,
)
from bridgetower.model.encodings import Encoded, Fused
from bridgetower.model.fusion import FusionOutputs
from bridgetower.model.layers import DotProductAttention, FeedForward, SelfAttention
from bridgetower.model.products import has_operators

# Of the largest activation of a fusion layer, in inference, for each thread. More pairs at once were slower: with two
# threads the base model took 0.116 s each for 32 encoded images with one text, 0.091 s for 8 (`benchmarks/run.py --only
# growth`).
BUFFER_BYTES = 2**24


def optimize_for_cpu(module: nn.Module) -> None:
    """Swaps in the kernels, for training or use on a CPU, with the same parameters, names and hooks.

    Modules from outside this package and PyTorch are left as they are, with all that is in them. What is to be exported
    or compiled must not be swapped; a `BridgeTower` that is moved to another device gets PyTorch's back.
    """
    parameter = next(module.parameters(), None)
    if has_operators() and (parameter is None or parameter.device.type == "cpu"):
        _swap(module, _KERNELS)


def _swap(module: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    if type(module).__module__.split(".")[0] in ("bridgetower", "torch"):
        module.__class__ = classes.get(type(module), type(module))
        for child in module.children():
            _swap(child, classes)


@torch.inference_mode(False)  # parameters made in that mode could not be loaded into another model
def pack_weights(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Swaps the kernels in and packs the weights of their linear layers, for inference; the state dict stays.

    Other parameters are copied, so that nothing holds on to a file that weights were mapped from. Under autocast,
    products stay in the number format of the packed weight.
    """
    optimize_for_cpu(model)
    for module in model.modules():
        if isinstance(module, OneDnnLinear) and computes(module.weight.device, dtype or module.weight.dtype):
            module.pack(dtype or module.weight.dtype)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "cpu" and not parameter.is_mkldnn:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


class ChunkedBridgeTower(BridgeTower):
    """Fuses some pairs after others in inference, so that activations stay small."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BridgeTower:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.device.type != "cpu":
            _swap(self, {kernel: plain for plain, kernel in _KERNELS.items()})
        return self

    def fuse(self, image: Encoded, text: Encoded, outputs: FusionOutputs = "pooled") -> Fused:
        if torch.is_grad_enabled() or self.training or not image.layers or len(image) != len(text):
            return super().fuse(image, text, outputs)
        hidden = image.layers[0]
        pair_bytes = hidden.shape[1] * self.config.fusion.intermediate_size * hidden.element_size()
        at_once = max(1, BUFFER_BYTES * torch.get_num_threads() // pair_bytes)
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
