"""Building blocks that the towers and the fusion encoder share.

With `num_queries`, a layer computes the first positions only.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint

from bridgetower.model.config import Activation, TextConfig, VisionConfig

# Types of tensors, with the letters of `bridgetower.model`.
Pixels = Float[Tensor, "b 3 h w"]
TokenIds = Int[Tensor, "b l"]
TokenMask = Bool[Tensor, "b l"] | None
"""False on padding; None if nothing is padded."""
Hidden = Float[Tensor, "b l d"]
Queries = Float[Tensor, "b q d"]
"""Hidden states of the first positions."""
Keys = Float[Tensor, "b m d"]
KeyMask = Bool[Tensor, "b m"] | None
PatchStates = Float[Tensor, "b p v"]
TokenStates = Float[Tensor, "b l t"]
TowerStates = Float[Tensor, "b l w"]
TowerVector = Float[Tensor, "b w"]

# Graphs of one layer's code that the compiler keeps: they differ by stream, position in the encoder and batch size.
GRAPHS = 64

logger = logging.getLogger(__name__)

# Names of the approximations in PyTorch.
GELU = {"gelu": "none", "gelu_tanh": "tanh"}


def activate(hidden: Float[Tensor, "*n"], activation: Activation) -> Float[Tensor, "*n"]:
    if activation == "quick_gelu":
        # Equal to x·σ(1.702x), which would keep two tensors for the gradient.
        return F.silu(1.702 * hidden).div_(1.702)
    if activation == "relu":
        return F.relu(hidden)
    return F.gelu(hidden, approximate=GELU[activation])


def activation_checkpointing(layer: Any, *, when: bool) -> Any:
    """Returns `layer`, or `when` true a form of it that keeps only its inputs and runs again for its gradients."""
    if when and torch.is_grad_enabled():
        return partial(checkpoint, layer, use_reentrant=False)
    return layer


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Returns the context of a forward pass, whose products run in bfloat16 if `precision` is `bf16`."""
    if not torch.amp.is_autocast_available(device.type):  # meta, for example
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@cache
def has_cuda() -> bool:
    return torch.cuda.is_available()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor without waiting."""
    # A copy to a GPU is asynchronous only from pinned memory.
    if tensor.device.type == "cpu" != device.type and has_cuda():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class _SkipInit(TorchFunctionMode):
    """Makes the functions of `torch.nn.init` return their tensor as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """Builds modules without memory for their weights."""
    # PyTorch imports its compiler to initialise weights on `meta`.
    with torch.device("meta"), _SkipInit():
        yield


def compiler_options(backend: Any, *, strict: bool = True) -> dict[str, Any]:
    """Returns options of `torch.compile`, with room for one graph for each kind of call.

    Unless `strict`, a graph that the backend cannot compile runs in PyTorch, with a warning.
    """
    options = {"backend": backend if strict else _with_fallback(backend)}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return options | {"recompile_limit": GRAPHS}
    # Older releases of PyTorch have no option for one function. The import takes seconds.
    from torch._dynamo import config

    config.recompile_limit = max(GRAPHS, config.recompile_limit)
    return options


def _with_fallback(backend: Any) -> Callable[..., Any]:
    """Returns a backend of the compiler that runs a graph in PyTorch if it cannot be compiled."""
    from torch._dynamo import lookup_backend

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        try:
            return lookup_backend(backend)(graph, inputs)
        except Exception as error:  # noqa: BLE001 - of any compiler
            logger.warning("a part of a layer is not compiled: %s", str(error).partition("\n")[0])
            return graph.forward

    return compile_graph


class DotProductAttention(nn.Module):
    """Scaled dot-product attention of several heads, without parameters."""

    def __init__(self, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout

    def forward(self, query: Queries, key: Keys, value: Keys, mask: KeyMask) -> Queries:
        """Returns softmax(q·kᵀ / √e)·v of every head, side by side, without weight where `mask` is False."""
        query, key, value = map(self.split_heads, (query, key, value))
        attention_mask = None if mask is None else mask[:, None, None, :]
        # Engines recognise attention in this form of a graph.
        if torch.compiler.is_exporting():
            scores = query @ key.mT * query.shape[-1] ** -0.5
            if attention_mask is not None:
                scores = scores + torch.where(attention_mask, 0.0, -3e38)  # finite in bfloat16
            context = scores.softmax(dim=-1) @ value
        else:
            rate = self.dropout if self.training else 0.0
            context = F.scaled_dot_product_attention(
                query, key, value, attn_mask=attention_mask, dropout_p=rate
            )
        return context.transpose(1, 2).flatten(2)

    def split_heads(self, hidden: Hidden) -> Float[Tensor, "b h l e"]:
        return hidden.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def is_plain(layer: nn.Module, kind: type[nn.Linear] = nn.Linear) -> bool:
    """Whether a layer is no more than its weight: no adapter, not quantised and without hooks."""
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    if type(layer) is not kind or any(hooks):
        return False
    return not is_traceable_wrapper_subclass(layer.weight)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection for query, key and value."""

    linear_layer: ClassVar[type[nn.Linear]] = nn.Linear
    product: ClassVar[Callable[..., Tensor]] = staticmethod(F.linear)

    def __init__(self, hidden_size: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention = DotProductAttention(num_heads, dropout)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, hidden: Hidden, mask: TokenMask = None, num_queries: int | None = None
    ) -> Queries:
        """Attends from the first `num_queries` positions (None: all) to every position where `mask` is True."""
        if (
            num_queries is None
            or not is_plain(self.qkv, self.linear_layer)
            or self.qkv.weight.is_mkldnn
        ):
            query, key, value = self.qkv(hidden).chunk(3, dim=-1)
            query = query[:, :num_queries]
        else:
            width = hidden.shape[-1]
            weight = self.qkv.weight
            bias = self.qkv.bias
            key_value = self.product(hidden, weight[width:], bias[width:])
            key, value = key_value.chunk(2, dim=-1)
            query = self.product(hidden[:, :num_queries], weight[:width], bias[:width])
        context = self.attention(query, key, value, mask)
        return self.out(context)


class CrossAttention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size)
        self.attention = DotProductAttention(num_heads, dropout)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, query: Queries, key_value: Float[Tensor, "b m e"], mask: KeyMask) -> Queries:
        key, value = key_value.chunk(2, dim=-1)
        context = self.attention(query, key, value, mask)
        return self.out(context)


class FeedForward(nn.Module):
    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: Activation = "gelu"
    ) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)
        self.activation = activation

    def forward(self, hidden: Hidden) -> Hidden:
        hidden = self.up(hidden)
        hidden = activate(hidden, self.activation)
        return self.down(hidden)


class PreNormLayer(nn.Module):
    """A ViT block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        eps = config.layer_norm_eps
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.attention = SelfAttention(width, config.num_heads)
        self.mlp_norm = nn.LayerNorm(width, eps=eps)
        self.mlp = FeedForward(width, config.intermediate_size, config.activation)

    def forward(
        self, hidden: Float[Tensor, "b p d"], mask: None = None, num_queries: int | None = None
    ) -> Queries:
        attended = self.attention(self.attention_norm(hidden), num_queries=num_queries)
        hidden = hidden[:, :num_queries] + attended
        return hidden + self.mlp(self.mlp_norm(hidden))


class PostNormLayer(nn.Module):
    """A BERT layer: norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        eps = config.layer_norm_eps
        dropout = config.dropout if config.attention_dropout is None else config.attention_dropout
        self.attention = SelfAttention(width, config.num_heads, dropout)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.mlp = FeedForward(width, config.intermediate_size, config.activation)
        self.mlp_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden: Hidden, mask: TokenMask = None, num_queries: int | None = None
    ) -> Queries:
        attended = self.attention(hidden, mask, num_queries)
        hidden = self.attention_norm(hidden[:, :num_queries] + self.dropout(attended))
        return self.mlp_norm(hidden + self.dropout(self.mlp(hidden)))


class Pooler(nn.Module):
    """tanh(Linear(x)) of the first token x of a stream."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Hidden) -> Float[Tensor, "b d"]:
        return torch.tanh(self.dense(hidden[:, 0]))


def mean_token(hidden: Hidden, mask: TokenMask) -> Float[Tensor, "b d"]:
    if mask is None:
        return hidden.mean(dim=1)
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)
