"""Which library computes float32 products on this processor: measured once, and kept.

PyTorch brings two along: oneDNN, and MKL or OpenBLAS behind `torch.mm`. Which is faster depends on the processor: on
AMD's, MKL uses half of the vector width; on Intel's with AMX, `torch.mm` was ahead.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from bridgetower.files import cache_folder, write_json

LIBRARIES: Final = ("onednn", "torch")
VARIABLE: Final = "BRIDGETOWER_PRODUCTS"  # of the environment: names one of them; without, the measurement decides
_CPU_INFO = Path("/proc/cpuinfo")


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
    return hasattr(torch, "_softmax_backward_data") and all(hasattr(torch.ops.mkldnn, name) for name in names)


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN is to compute float32 products; kept on disk, so that later processes have the same kernels."""
    if not torch.backends.mkldnn.is_available():
        return False
    if given := os.environ.get(VARIABLE):
        if given not in LIBRARIES:
            raise ValueError(f"{VARIABLE} is {given!r}; set it to one of {', '.join(LIBRARIES)}, or remove it")
        return given == "onednn"
    where = f"{processor_name()}, PyTorch {torch.__version__}"
    path = cache_folder() / "products" / f"{hashlib.sha256(where.encode()).hexdigest()[:16]}.json"
    try:
        kept = json.loads(path.read_bytes())["seconds"]
        seconds = {library: float(kept[library]) for library in LIBRARIES}
    except (OSError, ValueError, KeyError, TypeError):
        seconds = measure()
        with suppress(OSError):  # then it is measured again next time
            write_json(path, {"where": where, "seconds": seconds})
    return seconds["onednn"] < seconds["torch"] * 1.05  # so that noise does not decide


@torch.inference_mode()
def measure() -> dict[str, float]:
    rows, inputs, outputs = 325, 768, 3072  # of a feed-forward layer of the base model at 288 pixels
    hidden, weight, bias = torch.ones(rows, inputs), torch.ones(outputs, inputs), torch.ones(outputs)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    products: dict[str, Callable[[], Tensor]] = {
        "onednn": lambda: torch.ops.mkldnn._linear_pointwise(hidden, packed, bias, "none", [], ""),
        "torch": lambda: F.linear(hidden, weight, bias),
    }
    times: dict[str, list[float]] = {library: [] for library in LIBRARIES}
    for _ in range(8):
        for library, product in products.items():
            started = time.perf_counter()
            product()
            times[library].append(time.perf_counter() - started)
    return {library: statistics.median(seconds[1:]) for library, seconds in times.items()}
