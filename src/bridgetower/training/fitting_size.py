"""What to do when a micro-batch does not fit into the memory of a GPU: the largest one that does, found by trying."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bridgetower.data.batch import CachedFeatures
from bridgetower.distributed import world_size


def does_not_fit(batch: Any, run: Callable[[Any], object]) -> ValueError:
    """Returns the error of a micro-batch that does not fit, with a size that does.

    Args:
        batch: The micro-batch.
        run: Runs forward and backward on a part of it. Several processes exchange something in each pass, so that none
            can try alone: then half of the size is proposed.
    """
    size, fits = len(batch) // 2, None
    if world_size() > 1:
        return ValueError(f"a micro-batch of {len(batch)} does not fit into memory; try --micro-batch-size {size}")
    while size and fits is None:
        torch.cuda.empty_cache()
        fits, size = (size, size) if _runs(run, _first(batch, size)) else (None, size // 2)
    if fits is None:
        return ValueError(
            f"a micro-batch of {len(batch)} does not fit into memory, nor does one of 1; use --checkpoint-activations "
            "vision text fusion, --parallel fsdp or a smaller model"
        )
    return ValueError(
        f"a micro-batch of {len(batch)} does not fit into memory, one of {fits} does: use --micro-batch-size {fits}"
    )


def _runs(run: Callable[[Any], object], batch: Any) -> bool:
    try:
        run(batch)
    except torch.OutOfMemoryError:
        return False
    return True


def _first(batch: Any, count: int) -> Any:
    """Returns the first examples of a batch, with all texts that are theirs."""
    parts: dict[str, Any] = {}
    for name, value in vars(batch).items():
        if isinstance(value, CachedFeatures):
            parts[name] = value.first(count * len(value) // len(batch))
        elif isinstance(value, Tensor) and value.ndim > 0 and len(value) % len(batch) == 0:
            parts[name] = value[: count * len(value) // len(batch)]
    if "mlm_positions" in vars(batch):
        parts["mlm_positions"] = None  # they are looked for
    return replace(batch, ids=batch.ids[:count], **parts)
