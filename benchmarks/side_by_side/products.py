"""The machine's rate: the matrix products of a computation by themselves, each in the fastest way there is here."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

ONEDNN = torch.ops.mkldnn._linear_pointwise
KINDS = {  # of operations, by their names
    "products": (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "_mkl_linear",
        "_linear_pointwise",
        "mkldnn_convolution",
    ),
    "softmax": ("_softmax", "_softmax_backward_data", "masked_fill_"),
    "activations": (
        "gelu",
        "gelu_",
        "gelu_backward",
        "silu",
        "silu_",
        "silu_backward",
        "div_",
        "tanh",
    ),
    "norms": ("native_layer_norm", "native_layer_norm_backward"),
    "elementwise": ("add", "add_", "mul", "mul_", "sum"),
    "copies": ("copy_", "cat", "_reorder_linear_weight", "index", "fill_"),
}
TURNS = 3
COLD = 128 * 2**20  # bytes of operands that are in use in turn, so that none waits in a cache


@dataclass(frozen=True)
class Product:
    """`batch` products of [m, k] and [k, n] with operands of `dtype`."""

    batch: int
    m: int
    k: int
    n: int
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        """Two per multiply-add."""
        return 2 * self.batch * self.m * self.k * self.n


class Recorder(TorchDispatchMode):
    """Counts the matrix products that run while it is active, those of backward passes included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Looks at one operation and runs it."""
        product = _product(func, args)
        if product is not None and product.flops:
            self.products[product] += 1
        return func(*args, **(kwargs or {}))

    @property
    def flops(self) -> int:
        """Of all products."""
        return sum(product.flops * count for product, count in self.products.items())


def recorded(computation: Callable[[], object]) -> Recorder:
    """Returns the products of a computation."""
    # others do not say what they multiply
    with (
        Recorder() as recorder,
        sdpa_kernel(SDPBackend.MATH),
    ):
        computation()
    return recorder


def rates(computation: Callable[[], object], seconds: float) -> dict[str, float]:
    """Returns `gflops`, `products_gflops` and `share` of a row, for a computation that takes so many seconds."""
    recorder = recorded(computation)
    alone = sum(count * _fastest(product) for product, count in recorder.products.items())
    return {
        "gflops": recorder.flops / seconds / 1e9,
        "products_gflops": recorder.flops / alone / 1e9,
        "share": alone / seconds,
    }


def operations(computation: Callable[[], object]) -> dict[str, float]:
    """Returns the share that each kind of operation has of the seconds of a computation, as PyTorch's profiler does."""
    computation()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        computation()
    kind_of = {name: kind for kind, names in KINDS.items() for name in names}
    seconds = Counter[str]()
    for event in profile.key_averages():
        seconds[kind_of.get(event.key.split("::")[-1], "others")] += event.self_cpu_time_total
    return {kind: round(value / seconds.total(), 3) for kind, value in seconds.most_common()}


def nodes(make: Callable[[], Callable[[], object]]) -> dict[str, float]:
    """Returns seconds of each kind of node while OpenVINO, whose counters are on from `make` on, runs a computation."""
    import openvino

    seconds = Counter[str]()
    compiling, inferring = openvino.Core.compile_model, openvino.InferRequest.infer

    def compile_model(core: Any, model: Any, device: str, settings: dict[str, Any]) -> Any:
        return compiling(core, model, device, {**settings, "PERF_COUNT": True})

    def infer(request: Any, *given: Any, **options: Any) -> Any:
        outputs = inferring(request, *given, **options)
        for node in request.get_profiling_info():
            seconds[node.node_type] += node.real_time.total_seconds()
        return outputs

    with (
        patch.object(openvino.Core, "compile_model", compile_model),
        patch.object(openvino.InferRequest, "infer", infer),
    ):
        computation = make()
        for _ in range(TURNS):
            seconds.clear()
            computation()
    return dict(seconds.most_common())


def _product(func: Any, args: Any) -> Product | None:
    packet = func.overloadpacket
    if packet in (torch.ops.aten.mm, torch.ops.aten.bmm):
        first, second = args[0], args[1]
    elif packet in (torch.ops.aten.addmm, torch.ops.aten.baddbmm):
        first, second = args[1], args[2]
    elif packet is ONEDNN:
        rows, weight = args[0], args[1]
        return Product(1, prod(rows.shape[:-1]), rows.shape[-1], weight.shape[0], rows.dtype)
    elif packet in (torch.ops.aten.convolution, torch.ops.aten.mkldnn_convolution):
        pixels, weight = args[0], args[1]
        rows, columns = (
            size // kernel for size, kernel in zip(pixels.shape[2:], weight.shape[2:], strict=True)
        )
        places = len(pixels) * rows * columns
        return Product(1, places, prod(weight.shape[1:]), weight.shape[0], pixels.dtype)
    else:
        return None
    batch = first.shape[0] if first.ndim == 3 else 1
    return Product(batch, first.shape[-2], first.shape[-1], second.shape[-1], first.dtype)


@torch.no_grad()
def _fastest(product: Product) -> float:
    ways = (
        [_pytorch, _packed]
        if product.batch == 1 and product.dtype in _packed_dtypes()
        else [_pytorch]
    )
    return min(_best_seconds(*way(product)) for way in ways)


def _pytorch(product: Product) -> tuple[Callable[[Any], Tensor], list[Any]]:
    first = torch.randn(product.batch, product.m, product.k).to(product.dtype)
    operands = [
        torch.randn(product.batch, product.k, product.n).to(product.dtype)
        for _ in range(_copies(product))
    ]
    if product.batch == 1:
        rows = first[0]
        return lambda operand: torch.mm(rows, operand[0]), operands
    return lambda operand: torch.bmm(first, operand), operands


def _packed(product: Product) -> tuple[Callable[[Any], Tensor], list[Any]]:
    rows = torch.randn(product.m, product.k).to(product.dtype)
    weights = [torch.randn(product.n, product.k).to(product.dtype) for _ in range(_copies(product))]
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight, product.m) for weight in weights]
    return lambda weight: ONEDNN(rows, weight, None, "none", [], ""), packed


def _packed_dtypes() -> list[torch.dtype]:
    """Number formats in which oneDNN computes products with packed weights on this processor."""
    return [
        torch.float32,
        *([torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []),
    ]


def _copies(product: Product) -> int:
    size = product.batch * product.k * product.n * product.dtype.itemsize
    return max(1, min(64, COLD // max(size, 1)))


def _best_seconds(run: Callable[[Any], Tensor], operands: list[Any]) -> float:
    """Seconds of one product, the least of several turns through all operands."""
    turns = []
    for _ in range(TURNS):
        start = time.perf_counter()
        for operand in operands:
            run(operand)
        turns.append((time.perf_counter() - start) / len(operands))
    return min(turns)
