"""What makes the model fast on a CPU: the same numbers under the same names, from other kernels.

PyTorch has two libraries for products: oneDNN, and MKL or OpenBLAS behind `torch.mm`. Which is faster depends on the
processor, so it is measured once and kept, for gradients by themselves: on AMD's, MKL uses half of the vector width; on
Intel's with AMX, `torch.mm` was ahead; on one without, only in the gradients.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int8
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bridgetower.files import cache_folder, write_json
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import Activation
from bridgetower.model.fusion import Encoded, Fused, FusionOutputs
from bridgetower.model.layers import (
    GELU,
    DotProductAttention,
    FeedForward,
    Keys,
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
_LOWEST, _VALUES = -(2**15), 2**16  # of 16 bits
_NORM = "norm_of"  # attribute of a LayerNorm's output: its version, and what it was computed of
Products = Literal["outputs", "gradients"]
LIBRARIES: Final = ("onednn", "torch")
VARIABLE: Final = "BRIDGETOWER_PRODUCTS"  # of the environment: names one of them; without, the measurement decides
_CPU_INFO = Path("/proc/cpuinfo")


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
def pack_weights(
    model: nn.Module, dtype: torch.dtype | None = None, *, excluded: Iterable[nn.Module] = ()
) -> None:
    """Swaps the kernels in and packs the weights of their linear layers, for inference; the state dict stays.

    Modules that are `excluded` only get the kernels.
    """
    optimize_for_cpu(model)
    others = {module for part in excluded for module in part.modules()}
    for module in model.modules():
        if module in others:
            continue
        if isinstance(module, OneDnnLinear) and computes(
            module.weight.device, dtype or module.weight.dtype
        ):
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
        fused = [
            super(ChunkedBridgeTower, self).fuse(image[part], text[part], outputs) for part in parts
        ]
        named = zip(Fused._fields, zip(*fused, strict=True), strict=True)
        return Fused(
            **{name: torch.cat(tensors) for name, tensors in named if tensors[0] is not None}
        )


class OneDnnLinear(nn.Linear):
    """x·Wᵀ + b, with a weight that can be packed for inference; whoever copies, moves or loads it meets a dense one."""

    def forward(self, input: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:  # noqa: A002 - torch's name
        return linear(input, self.weight, self.bias)

    def pack(self, dtype: torch.dtype) -> None:
        """Stores the weight in `dtype`, in the order in which oneDNN reads it; no rows can be taken of it then."""
        dense = _dense(self.weight.detach()).to(dtype)
        self.weight = nn.Parameter(
            torch.ops.mkldnn._reorder_linear_weight(dense, None), requires_grad=False
        )

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


class RecomputedFeedForward(FeedForward):
    """Keeps the input of the activation for the gradients and computes its output again; works in place without."""

    def forward(self, hidden: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        up = self.up(hidden)
        if torch.is_grad_enabled():
            if is_plain(self.down, OneDnnLinear):
                return linear(up, self.down.weight, self.down.bias, self.activation)
            return self.down(activate(up, self.activation))
        return self.down(
            (activate_ if is_plain(self.up, OneDnnLinear) else activate)(up, self.activation)
        )


class RecomputedLayerNorm(nn.LayerNorm):
    """Marks its output, so that linear layers keep the norm's input for the gradients, which the norm keeps anyway."""

    def forward(self, input: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:  # noqa: A002 - torch's name
        output = super().forward(input)
        if output.requires_grad:
            setattr(output, _NORM, (output._version, self.eps, input, self.weight, self.bias))
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
    elif (
        not hidden.dtype == weight.dtype == torch.float32
        or hidden.numel() == 0
        or torch.is_autocast_enabled("cpu")
    ):
        inputs = hidden if activation is None else _Activated.apply(hidden, activation)  # type: ignore[no-untyped-call]
        return F.linear(inputs, weight, bias)
    if not torch.is_grad_enabled():
        return _outputs(_input(hidden, activation), weight, bias)
    return _Linear.apply(hidden, weight, bias, activation)  # type: ignore[no-untyped-call]


class OneDnnSelfAttention(SelfAttention):
    linear_layer, product = OneDnnLinear, staticmethod(linear)


def computes(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float32:
        return onednn_is_faster("outputs")
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """From oneDNN, which is slow on operands that are neither dense nor transposed."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    rows = rows if rows.T.is_contiguous() else rows.contiguous()
    output = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return output.view(*hidden.shape[:-1], weight.shape[0])


def _outputs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return (_product if weight.is_mkldnn or onednn_is_faster("outputs") else F.linear)(
        hidden, weight, bias
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None
    ) -> Tensor:
        version, ctx.eps, *norm = getattr(hidden, _NORM, (None, None))
        unchanged = version is not None and version == hidden._version
        ctx.save_for_backward(weight, *(norm if unchanged else [hidden]))
        ctx.activation = activation
        return _outputs(_input(hidden, activation), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        weight, hidden, *norm = ctx.saved_tensors
        if norm:
            hidden = F.layer_norm(hidden, hidden.shape[-1:], norm[0], norm[1], ctx.eps)
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1]).contiguous()
        product = _product if onednn_is_faster("gradients") else F.linear
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        of_hidden = of_weight = None
        if to_hidden:
            of_hidden = product(gradient, _dense(weight).T).view(hidden.shape)
            of_hidden = (
                of_hidden
                if ctx.activation is None
                else activation_gradient(of_hidden, hidden, ctx.activation)
            )
        if to_weight:
            inputs = _input(hidden, ctx.activation)
            of_weight = product(gradient.T, inputs.reshape(-1, inputs.shape[-1]).contiguous().T)
        return of_hidden, of_weight, gradient.sum(dim=0) if to_bias else None, None


def _input(hidden: Tensor, activation: Activation | None) -> Tensor:
    return hidden if activation is None else activate(hidden, activation)


def _dense(weight: Tensor) -> Tensor:
    return weight.to_dense() if weight.is_mkldnn else weight


def activate_(hidden: Float[Tensor, "*n"], activation: Activation) -> Float[Tensor, "*n"]:
    """Like `activate` in the place of its input: new memory costs more time than the activation."""
    if activation == "quick_gelu":
        return F.silu(hidden.mul_(1.702), inplace=True).div_(1.702)
    if activation == "relu":
        return hidden.relu_()
    return torch.ops.aten.gelu_(hidden, approximate=GELU[activation])


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
        return activate(hidden, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (hidden,) = ctx.saved_tensors
        return activation_gradient(gradients[0], hidden, ctx.activation), None


class BlockedAttention(DotProductAttention):
    """Attention some heads at a time, whose scores stay in the cache."""

    def forward(
        self,
        query: Float[Tensor, "b q d"],
        key: Keys,
        value: Keys,
        mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b q d"]:
        rate = self.dropout if self.training else 0.0
        context = _WrittenOut.apply(*map(self.split_heads, (query, key, value)), mask, rate)  # type: ignore[no-untyped-call]
        return context.transpose(1, 2).flatten(2)


class SharedDrawDropout(nn.Dropout):
    """Dropout, whose draws cost a fifth of PyTorch's."""

    def forward(self, input: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:  # noqa: A002 - torch's name
        if not self.training or self.p == 0:
            return input
        return _Dropout.apply(input, draw_kept(input.shape, self.p), 1 / (1 - self.p))  # type: ignore[no-untyped-call]


class _WrittenOut(torch.autograd.Function):
    """softmax(q·kᵀ / √e)·v, some heads at a time; few weights are kept for the gradients, many computed again."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
    ) -> Tensor:
        kept = draw_kept((*query.shape[:3], key.shape[2]), dropout) if dropout else None
        # [B·H, L, E]
        queries, keys, values = copies = [tensor.flatten(0, 1) for tensor in (query, key, value)]
        length, stored = max(queries.shape[1], keys.shape[1]), None
        # longer ones need more memory than two inputs
        if any(ctx.needs_input_grad) and length <= 2 * queries.shape[2]:
            stored = queries.new_empty(len(queries), queries.shape[1], keys.shape[1])
        # [B·H, 1, M]
        hidden = None if mask is None else ~mask.repeat_interleave(query.shape[1], dim=0)[:, None]
        inputs = (
            (query, key, value)
            if stored is None
            else (copy.unflatten(0, query.shape[:2]) for copy in copies)
        )
        ctx.save_for_backward(*inputs, hidden, kept, stored)
        ctx.scale = 1 / (1 - dropout)
        context = torch.empty_like(queries)
        for rows, weights in _weights(queries, keys, hidden, stored):
            dropped = (
                weights if kept is None else _factor(kept, rows, weights, ctx.scale).mul_(weights)
            )
            torch.bmm(dropped, values[rows], out=context[rows])
        return context.view_as(query)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        *inputs, hidden, kept, stored = ctx.saved_tensors
        queries, keys, values, gradient = (
            tensor.flatten(0, 1) for tensor in (*inputs, gradients[0])
        )
        to_queries, to_keys, to_values = (
            torch.empty_like(tensor) for tensor in (queries, keys, values)
        )
        scale = queries.shape[-1] ** -0.5
        known = (
            None if stored is None else ((rows, stored[rows]) for rows in _blocks(queries, keys))
        )
        for rows, weights in known or _weights(queries, keys, hidden):
            to_weights = torch.bmm(gradient[rows], values[rows].mT)
            dropped = weights
            if kept is not None:
                factor = _factor(kept, rows, weights, ctx.scale)
                to_weights, dropped = to_weights.mul_(factor), factor.mul_(weights)
            torch.bmm(dropped.mT, gradient[rows], out=to_values[rows])
            to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype).mul_(
                scale
            )
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
        torch.baddbmm(
            scores,
            queries[rows],
            keys[rows].mT,
            beta=0,
            alpha=queries.shape[-1] ** -0.5,
            out=scores,
        )
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
    draws = (
        torch.empty(-(-count // 4), dtype=torch.int64)
        .random_(-(2**63), None)
        .view(torch.int16)[:count]
    )
    lowest_kept = _LOWEST + round(rate * _VALUES)
    # 1 from the lowest kept value on; comparing 16-bit integers is not vectorised, this is.
    return (
        draws.clamp_(lowest_kept - 1, lowest_kept).sub_(lowest_kept - 1).to(torch.int8).view(*shape)
    )


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
    text = _CPU_INFO.read_text() if _CPU_INFO.exists() else ""
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def processor_name() -> str:
    """Returns its name, with family and model where they are known: clouds often hide the rest."""
    info = cpu_info()
    if "model name" not in info:
        return platform.processor() or platform.machine()
    return f"{info['model name']}, family {info.get('cpu family')}, model {info.get('model')}"


def has_operators() -> bool:
    """Whether PyTorch has the private operators that the kernels for CPUs call; a release may come without."""
    names = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    return hasattr(torch, "_softmax_backward_data") and all(
        hasattr(torch.ops.mkldnn, name) for name in names
    )


@cache
def onednn_is_faster(products: Products) -> bool:
    """Whether oneDNN is to compute float32 products; kept on disk, so that later processes have the same kernels."""
    if not torch.backends.mkldnn.is_available():
        return False
    if given := os.environ.get(VARIABLE):
        if given not in LIBRARIES:
            raise ValueError(
                f"{VARIABLE} is {given!r}; set it to one of {', '.join(LIBRARIES)}, or remove it"
            )
        return given == "onednn"
    where = f"{products}, {processor_name()}, PyTorch {torch.__version__}"
    path = cache_folder() / "products" / f"{hashlib.sha256(where.encode()).hexdigest()[:16]}.json"
    try:
        kept = json.loads(path.read_bytes())["seconds"]
        seconds = {library: float(kept[library]) for library in LIBRARIES}
    except (OSError, ValueError, KeyError, TypeError):
        seconds = measure(products)
        with suppress(OSError):  # then it is measured again next time
            write_json(path, {"where": where, "seconds": seconds})
    return seconds["onednn"] < seconds["torch"] * 1.05  # so that noise does not decide


@torch.inference_mode()
def measure(products: Products) -> dict[str, float]:
    # of a feed-forward layer of the base model at 288 pixels
    rows, inputs, outputs = (
        325,
        3072,
        768,
    )
    hidden, weight, bias = (
        torch.ones(rows, inputs),
        torch.ones(outputs, inputs),
        torch.ones(outputs),
    )
    gradient, packed = (
        torch.ones(rows, outputs),
        torch.ops.mkldnn._reorder_linear_weight(weight, None),
    )
    ways: dict[Products, tuple[Callable[[], object], Callable[[], object]]] = {
        "outputs": (
            lambda: torch.ops.mkldnn._linear_pointwise(hidden, packed, bias, "none", [], ""),
            lambda: F.linear(hidden, weight, bias),
        ),
        "gradients": (
            lambda: (_product(gradient, weight.T), _product(gradient.T, hidden.T)),
            lambda: (F.linear(gradient, weight.T), F.linear(gradient.T, hidden.T)),
        ),
    }
    times: dict[str, list[float]] = {library: [] for library in LIBRARIES}
    for _ in range(8):
        for library, run in zip(LIBRARIES, ways[products], strict=True):
            started = time.perf_counter()
            run()
            times[library].append(time.perf_counter() - started)
    return {library: statistics.median(seconds[1:]) for library, seconds in times.items()}
