"""Kernels for CPUs, which replace PyTorch's modules and have the same numbers, parameters and names.

PyTorch has two libraries for products: oneDNN, and MKL or OpenBLAS behind `torch.mm`. Figures of memory and time below
are of training steps in `benchmarks/cpu_kernels.py` on a busy AMD EPYC (family 25, model 17).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import Activation
from bridgetower.model.fusion import Encoded, Fused, FusionOutputs
from bridgetower.model.layers import (
    DotProductAttention,
    FeedForward,
    Hidden,
    KeyMask,
    Keys,
    Queries,
    SelfAttention,
    activate,
    is_plain,
)

# Of the largest activation of a fusion layer, in inference, for each thread. More pairs at once were slower: with two
# threads the base model took 0.116 s each for 32 encoded images with one text, 0.091 s for 8 (`benchmarks/run.py --only
# growth`).
BUFFER_BYTES = 2**24
# Of attention scores in work at once, for each thread: enough for one product to be worth it, and in the cache.
_SCORE_BYTES = 2 * 2**20
_NORM_ATTRIBUTE = "norm_inputs"  # of a LayerNorm's output
Products = Literal["outputs", "gradients"]
LIBRARIES: Final = ("onednn", "torch")
VARIABLE: Final = "BRIDGETOWER_PRODUCTS"  # of the environment
_CPU_INFO = Path("/proc/cpuinfo")


def optimize_for_cpu(module: nn.Module) -> None:
    """Swaps in the kernels, for training or use on a CPU, with the same parameters, names and hooks.

    Modules from outside this package and PyTorch are left as they are, with all that is in them. A model must not be
    exported or compiled afterwards. A `BridgeTower` that is moved to another device gets PyTorch's modules back.
    """
    parameter = next(module.parameters(), None)
    if has_operators() and (parameter is None or parameter.device.type == "cpu"):
        _swap(module, _KERNELS)


def _swap(module: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    kind = type(module)
    package = kind.__module__.split(".")[0]
    if package in ("bridgetower", "torch"):
        module.__class__ = classes.get(kind, kind)
        for child in module.children():
            _swap(child, classes)


@torch.inference_mode(False)  # parameters made in that mode could not be loaded into another model
def pack_weights(
    model: nn.Module, dtype: torch.dtype | None = None, *, excluded: Iterable[nn.Module] = ()
) -> None:
    """Swaps the kernels in and packs the weights of their linear layers for inference. The state dict stays the same.

    Modules in `excluded` get the kernels only.
    """
    optimize_for_cpu(model)
    skipped = {module for encoder in excluded for module in encoder.modules()}
    for module in model.modules():
        if module in skipped:
            continue
        if isinstance(module, OneDnnLinear):
            module.pack(dtype or module.weight.dtype)
        # Copies of all others, as each of them keeps alive the whole memory that a checkpoint was read to.
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "cpu" and not parameter.is_mkldnn:
                copied = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                setattr(module, name, copied)


class ChunkedBridgeTower(BridgeTower):
    """Fuses a few pairs at a time in inference, so that activations stay small."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BridgeTower:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.device.type != "cpu":
            _swap(self, {kernel: plain for plain, kernel in _KERNELS.items()})
        return self

    def fuse(self, image: Encoded, text: Encoded, outputs: FusionOutputs = "pooled") -> Fused:
        if torch.is_grad_enabled() or self.training or not image.layers or len(image) != len(text):
            return super().fuse(image, text, outputs)
        hidden = image.layers[0]
        num_values = hidden.shape[1] * self.config.fusion.intermediate_size
        pair_bytes = num_values * hidden.element_size()
        num_pairs = max(1, BUFFER_BYTES * torch.get_num_threads() // pair_bytes)
        if len(image) <= num_pairs:
            return super().fuse(image, text, outputs)
        chunks = []
        for start in range(0, len(image), num_pairs):
            rows = slice(start, start + num_pairs)
            chunks.append(super().fuse(image[rows], text[rows], outputs))
        joined: list[Any] = []
        for tensors in zip(*chunks, strict=True):
            is_computed = tensors[0] is not None
            joined.append(torch.cat(tensors) if is_computed else None)
        return Fused(*joined)


class OneDnnLinear(nn.Linear):
    """x·Wᵀ + b, with a weight that can be packed for inference. Copying, moving and loading unpack it."""

    def forward(self, input: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:  # noqa: A002 - torch's name
        return linear(input, self.weight, self.bias)

    def pack(self, dtype: torch.dtype) -> None:
        """Stores the weight in `dtype` in oneDNN's order, without access to rows, if oneDNN computes this product."""
        if self.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return
        is_computed = dtype == torch.float32 and onednn_is_faster("outputs")
        if dtype == torch.bfloat16:
            is_computed = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if not is_computed:
            return
        dense = _dense(self.weight.detach()).to(dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(dense, None)
        self.weight = nn.Parameter(packed, requires_grad=False)

    @contextmanager
    def _unpacked(self) -> Iterator[None]:
        is_packed = self.weight.is_mkldnn
        if is_packed:
            self.weight = nn.Parameter(self.weight.to_dense(), requires_grad=False)
        try:
            yield
        finally:
            if is_packed:
                self.pack(self.weight.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OneDnnLinear:
        with self._unpacked():
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any) -> None:
        with self._unpacked():
            super()._load_from_state_dict(*args)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = _dense(destination[prefix + "weight"])

    def __getstate__(self) -> dict[str, Any]:
        if not self.weight.is_mkldnn:
            return vars(self)
        dense = nn.Parameter(self.weight.to_dense(), requires_grad=False)
        return vars(self) | {"_parameters": self._parameters | {"weight": dense}}


class OneDnnSelfAttention(SelfAttention):
    linear_layer = OneDnnLinear

    @staticmethod
    def product(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear(hidden, weight, bias)


class RecomputedFeedForward(FeedForward):
    """Computes the output of the activation again for the gradients, which saves 34 of 177 MiB."""

    def forward(self, hidden: Hidden) -> Hidden:
        if not is_plain(self.down, OneDnnLinear):
            return super().forward(hidden)
        return linear(self.up(hidden), self.down.weight, self.down.bias, self.activation)


class NormInputs(NamedTuple):
    """Inputs of a LayerNorm, as an attribute of its output."""

    version: int  # of the output, which an operation in place increases
    eps: float
    hidden: Tensor
    weight: Tensor
    bias: Tensor


class RecomputedLayerNorm(nn.LayerNorm):
    """Marks its output, of which a linear layer keeps the norm's input for the gradients, which saves 25 of 168 MiB."""

    def forward(self, input: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:  # noqa: A002 - torch's name
        output = super().forward(input)
        if output.requires_grad:
            inputs = NormInputs(output._version, self.eps, input, self.weight, self.bias)
            setattr(output, _NORM_ATTRIBUTE, inputs)
        return output


def linear(
    hidden: Float[Tensor, "*n i"],
    weight: Float[Tensor, "o i"],
    bias: Float[Tensor, " o"] | None,
    activation: Activation | None = None,
) -> Float[Tensor, "*n o"]:
    """Returns activation(hidden) · weightᵀ + bias, and keeps `hidden` or its LayerNorm's input for the gradients."""
    is_float32 = hidden.dtype == weight.dtype == torch.float32
    if weight.is_mkldnn:
        hidden = hidden.to(weight.dtype)
        bias = None if bias is None else bias.to(weight.dtype)
    elif not is_float32 or hidden.numel() == 0 or torch.is_autocast_enabled("cpu"):
        return F.linear(_activated(hidden, activation), weight, bias)
    if not torch.is_grad_enabled():
        return _outputs(_activated(hidden, activation), weight, bias)
    return _Linear.apply(hidden, weight, bias, activation)  # type: ignore[no-untyped-call]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None
    ) -> Tensor:
        norm: NormInputs | None = getattr(hidden, _NORM_ATTRIBUTE, None)
        if norm is not None and norm.version == hidden._version:
            ctx.eps = norm.eps
            ctx.save_for_backward(weight, norm.hidden, norm.weight, norm.bias)
        else:
            ctx.save_for_backward(weight, hidden)
        ctx.activation = activation
        return _outputs(_activated(hidden, activation), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        weight, hidden, *norm_parameters = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        product = _product if onednn_is_faster("gradients") else F.linear
        gradient = gradients[0]
        gradient = gradient.reshape(-1, gradient.shape[-1]).contiguous()

        # The inputs of the product are computed again.
        if norm_parameters:
            norm_weight, norm_bias = norm_parameters
            hidden = F.layer_norm(hidden, hidden.shape[-1:], norm_weight, norm_bias, ctx.eps)
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_(needs_hidden)
            inputs = _activated(hidden, ctx.activation)

        # Gradients of the inputs that need them.
        to_hidden = None
        to_weight = None
        to_bias = None
        if needs_hidden:
            to_hidden = product(gradient, _dense(weight).T).view(hidden.shape)
            if inputs is not hidden:
                (to_hidden,) = torch.autograd.grad(inputs, hidden, to_hidden)
        if needs_weight:
            rows = inputs.detach().reshape(-1, inputs.shape[-1])
            to_weight = product(gradient.T, rows.contiguous().T)
        if needs_bias:
            to_bias = gradient.sum(dim=0)
        return to_hidden, to_weight, to_bias, None


def _activated(hidden: Tensor, activation: Activation | None) -> Tensor:
    return hidden if activation is None else activate(hidden, activation)


def _dense(weight: Tensor) -> Tensor:
    return weight.to_dense() if weight.is_mkldnn else weight


def _outputs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.is_mkldnn or onednn_is_faster("outputs"):
        return _product(hidden, weight, bias)
    return F.linear(hidden, weight, bias)


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns hidden · weightᵀ + bias from oneDNN, which is slow on operands that are neither dense nor transposed."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    if not rows.T.is_contiguous():
        rows = rows.contiguous()
    output = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return output.view(*hidden.shape[:-1], weight.shape[0])


class BlockedAttention(DotProductAttention):
    """Attention of some heads at a time, with scores in the cache, which saves 61 of 204 MiB and 0.12 of 0.56 s."""

    def forward(self, query: Queries, key: Keys, value: Keys, mask: KeyMask) -> Queries:
        rate = self.dropout if self.training else 0.0
        query, key, value = map(self.split_heads, (query, key, value))
        context = _BlockedAttention.apply(query, key, value, mask, rate)  # type: ignore[no-untyped-call]
        return context.transpose(1, 2).flatten(2)


class _BlockedAttention(torch.autograd.Function):
    """softmax(q·kᵀ / √e)·v, which keeps few weights for the gradients and computes many again."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
    ) -> Tensor:
        # The heads of all samples, [B·H, L, E].
        num_heads = query.shape[1]
        queries = query.flatten(0, 1)
        keys = key.flatten(0, 1)
        values = value.flatten(0, 1)
        is_padding = None
        if mask is not None:
            is_padding = ~mask.repeat_interleave(num_heads, dim=0)[:, None]

        # What is kept for the gradients. Weights of longer inputs need more memory than two of the inputs.
        shape = (len(queries), queries.shape[1], keys.shape[1])
        dropout_mask = draw_mask(shape, dropout) if dropout else None
        stored = None
        if any(ctx.needs_input_grad) and max(shape[1:]) <= 2 * queries.shape[2]:
            stored = queries.new_empty(shape)
        ctx.scale = 1 / (1 - dropout)
        ctx.save_for_backward(query, key, value, is_padding, dropout_mask, stored)

        # Some heads at a time.
        context = torch.empty_like(queries)
        for rows, weights in _weight_blocks(queries, keys, is_padding, stored):
            dropped = weights
            if dropout_mask is not None:
                dropped = _drop(weights, dropout_mask[rows], ctx.scale)
            torch.bmm(dropped, values[rows], out=context[rows])
        return context.view_as(query)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        *inputs, is_padding, dropout_mask, stored = ctx.saved_tensors
        flat = [tensor.flatten(0, 1) for tensor in (*inputs, gradients[0])]
        queries, keys, values, gradient = flat
        to_queries, to_keys, to_values = map(torch.empty_like, flat[:3])
        scale = queries.shape[-1] ** -0.5
        if stored is None:
            weight_blocks = _weight_blocks(queries, keys, is_padding)
        else:
            weight_blocks = ((rows, stored[rows]) for rows in _blocks(queries, keys))
        for rows, weights in weight_blocks:
            to_weights = torch.bmm(gradient[rows], values[rows].mT)
            dropped = weights
            if dropout_mask is not None:
                to_weights = _drop(to_weights, dropout_mask[rows], ctx.scale)
                dropped = _drop(weights, dropout_mask[rows], ctx.scale)
            torch.bmm(dropped.mT, gradient[rows], out=to_values[rows])
            to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
            to_scores.mul_(scale)
            torch.bmm(to_scores, keys[rows], out=to_queries[rows])
            torch.bmm(to_scores.mT, queries[rows], out=to_keys[rows])
        heads = gradients[0].shape[:2]
        return (
            to_queries.unflatten(0, heads),
            to_keys.unflatten(0, heads),
            to_values.unflatten(0, heads),
            None,
            None,
        )


def _weight_blocks(
    queries: Tensor, keys: Tensor, is_padding: Tensor | None, stored: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yields the attention weights of some heads at a time, all in one buffer or in `stored`."""
    blocks = _blocks(queries, keys)
    if stored is None and blocks:
        buffer = queries.new_empty(blocks[0].stop, queries.shape[1], keys.shape[1])
    for rows in blocks:
        count = rows.stop - rows.start
        scores = buffer[:count] if stored is None else stored[rows]
        scale = queries.shape[-1] ** -0.5
        torch.baddbmm(scores, queries[rows], keys[rows].mT, beta=0, alpha=scale, out=scores)
        if is_padding is not None:
            scores.masked_fill_(is_padding[rows], -torch.inf)
        yield rows, torch.softmax(scores, dim=-1, out=scores)


def _blocks(queries: Tensor, keys: Tensor) -> list[slice]:
    num_heads = len(queries)
    num_scores = queries.shape[1] * keys.shape[1]
    head_bytes = max(1, num_scores * queries.element_size())
    step = max(1, _SCORE_BYTES * torch.get_num_threads() // head_bytes)
    starts = range(0, num_heads, step)
    return [slice(start, min(start + step, num_heads)) for start in starts]


class SharedDrawDropout(nn.Dropout):
    """Dropout with one draw for four values, which saves 10 of 153 MiB and 0.03 of 0.47 s."""

    def forward(self, input: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:  # noqa: A002 - torch's name
        if not self.training or self.p == 0:
            return input
        return _Dropout.apply(input, self.p)  # type: ignore[no-untyped-call]


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rate: float) -> Tensor:
        dropout_mask = draw_mask(hidden.shape, rate)
        ctx.save_for_backward(dropout_mask)
        ctx.scale = 1 / (1 - rate)
        return _drop(hidden, dropout_mask, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (dropout_mask,) = ctx.saved_tensors
        return _drop(gradients[0], dropout_mask, ctx.scale), None


def _drop(values: Tensor, dropout_mask: Tensor, scale: float) -> Tensor:
    return dropout_mask.to(values.dtype).mul_(values).mul_(scale)


def draw_mask(shape: Sequence[int], rate: float) -> Int8[Tensor, "..."]:
    """Draws 1 with probability 1 - `rate`, rounded to 2⁻¹⁶, else 0. One draw of 64 bits serves four values."""
    num_dropped = round(rate * 2**16)  # of the values of 16 bits
    if not 0 < num_dropped < 2**16:
        return torch.empty(*shape, dtype=torch.int8).bernoulli_(1 - rate)
    count = prod(shape)
    num_draws = (count + 3) // 4
    draws = torch.empty(num_draws, dtype=torch.int64).random_(-(2**63), None)
    # PyTorch does not vectorise the comparison of 16-bit integers, so this maps them to 0 and 1.
    highest_dropped = num_dropped - 2**15 - 1
    dropout_mask = draws.view(torch.int16)[:count].clamp_(highest_dropped, highest_dropped + 1)
    return dropout_mask.sub_(highest_dropped).to(torch.int8).view(*shape)


_KERNELS: dict[type[nn.Module], type[nn.Module]] = {
    BridgeTower: ChunkedBridgeTower,
    DotProductAttention: BlockedAttention,
    FeedForward: RecomputedFeedForward,
    SelfAttention: OneDnnSelfAttention,
    nn.Dropout: SharedDrawDropout,
    nn.LayerNorm: RecomputedLayerNorm,
    nn.Linear: OneDnnLinear,
}


def cpu_info() -> dict[str, str]:
    """Returns what Linux says of the first processor, such as `flags`."""
    if not _CPU_INFO.exists():
        return {}
    first_processor, *_ = _CPU_INFO.read_text().split("\n\n")
    pairs = (line.partition(":") for line in first_processor.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def processor_name() -> str:
    """Returns the name of the processor, with family and model, as clouds often hide the rest."""
    info = cpu_info()
    if "model name" not in info:
        return platform.processor() or platform.machine()
    return f"{info['model name']}, family {info.get('cpu family')}, model {info.get('model')}"


def has_operators() -> bool:
    """Whether PyTorch has the private operators that the kernels call, as a release may lack them."""
    names = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    has_products = all(hasattr(torch.ops.mkldnn, name) for name in names)
    return has_products and hasattr(torch, "_softmax_backward_data")


@cache
def onednn_is_faster(products: Products) -> bool:
    """Whether oneDNN computes float32 products in less time than MKL, by the kind of processor.

    On AMD's, oneDNN took four fifths of the time of MKL. On Intel's, MKL was faster for gradients, and with AMX for
    outputs too.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if library := os.environ.get(VARIABLE):
        if library not in LIBRARIES:
            raise ValueError(
                f"{VARIABLE} is {library!r}; set it to one of {', '.join(LIBRARIES)}, or remove it"
            )
        return library == "onednn"
    info = cpu_info()
    if info.get("vendor_id") != "GenuineIntel":
        return True
    return products == "outputs" and "amx_tile" not in info.get("flags", "").split()
