"""How a module is trained by several processes: replicated (DDP), its gradients averaged; and the norm of these."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bridgetower.distributed import world_size


def run_device(choice: str) -> torch.device:
    """Returns the device of this process: with `auto` an accelerator if there is one, else the CPU."""
    if choice != "auto":
        return torch.device(choice)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def parallelized(task: nn.Module) -> nn.Module:
    """Returns what runs `task` in every process of the run; alone, the task itself.

    Args:
        task: On its device.
    """
    if world_size() == 1:
        return task
    # Heads and towers that the current phase does not use get no gradient.
    return DistributedDataParallel(task, find_unused_parameters=True)


def accumulating(task: Any, *, when: bool) -> AbstractContextManager[None]:
    """Returns a context of passes whose gradients stay in this process: those of the next pass are averaged with them.

    Args:
        task: From `parallelized`.
        when: False: gradients are averaged.
    """
    return task.no_sync() if when and isinstance(task, DistributedDataParallel) else nullcontext()


def clip_gradients(task: nn.Module, limit: float | None) -> Tensor:
    """Shortens all gradients together to `limit` if there is one; returns their norm of before."""
    return nn.utils.clip_grad_norm_(task.parameters(), math.inf if limit is None else limit)
