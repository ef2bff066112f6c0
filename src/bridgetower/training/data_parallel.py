"""How several processes train one task: replicas (DDP), or each with a share of the weights (FSDP2, `sharding`)."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bridgetower.distributed import rank, world_size


def run_device(choice: str) -> torch.device:
    """Returns the device of this process: with `auto` an accelerator if there is one, else the CPU."""
    if choice != "auto":
        return torch.device(choice)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def set_numerics(device: torch.device, precision: str, *, deterministic: bool) -> None:
    """Sets how PyTorch computes products of float32 on GPUs, and whether its kernels have to give the same bits."""
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision tf32 is for GPUs, not for {device.type}; use fp32 or bf16")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


class Replicated:
    """A task whose weights every process has whole; one process alone has nothing to average.

    Parameters without a gradient, such as heads that a phase does not use, are looked for in the graph of each step. If
    a task has an attribute `graph`, this is done in the first step with each value of it only.
    """

    def __init__(self, task: nn.Module) -> None:
        self.task, self.run = task, task
        self._graph, self._used = _graph_of(task), set[str]()
        if world_size() > 1:
            self.run = _averaging(task, self._used)

    def __call__(self, *inputs: Any) -> Any:
        """Runs the task."""
        self._follow_graph()
        return self.run(*inputs)

    def accumulating(self, *, when: bool) -> AbstractContextManager[None]:
        """Returns a context of passes whose gradients stay in this process and are averaged with those of the next."""
        self._follow_graph()
        return self.run.no_sync() if when and isinstance(self.run, DistributedDataParallel) else nullcontext()

    def clip_gradients(self, limit: float | None) -> Tensor:
        """Shortens all gradients together to `limit` if there is one; returns their norm of before."""
        if self._graph is not None and isinstance(self.run, DistributedDataParallel):
            used = {name for name, parameter in self.task.named_parameters() if parameter.grad is not None}
            self._used = self._used or used
            if changed := sorted(used ^ self._used):
                raise ValueError(
                    f"{changed[0]} and {len(changed) - 1} other parameters got a gradient in some steps with the same "
                    "`graph` of the task and none in others, which processes cannot average; leave `graph` out"
                )
        return nn.utils.clip_grad_norm_(self.task.parameters(), math.inf if limit is None else limit)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switches to evaluation mode, with the whole weights in every process."""
        self.task.eval()
        yield
        self.task.train()

    def _follow_graph(self) -> None:
        """Before a pass: looks for parameters without a gradient after a change, and no longer once they are known."""
        if not isinstance(self.run, DistributedDataParallel):
            return
        graph = _graph_of(self.task)
        if graph != self._graph:
            self._graph, self._used = graph, set()
        if self.run.find_unused_parameters is bool(self._used):
            self.run = self.task
            gc.collect()  # the old one refers to itself, and holds memory for all gradients
            self.run = _averaging(self.task, self._used)


def _graph_of(task: nn.Module) -> object:
    """Returns what stays the same as long as the same parameters get gradients; None: nothing is known to."""
    # The order in which gloo adds up more than two numbers depends on their place in a bucket, and only buckets of
    # parameters that are looked for never change. So runs on CPUs resume with the same bits.
    by_place = world_size() > 2 and next(task.parameters()).device.type == "cpu"
    return None if by_place else getattr(task, "graph", None)


def _averaging(task: nn.Module, used: Collection[str]) -> DistributedDataParallel:
    """Returns a task whose gradients are averaged: those of the used parameters, or if there are none, all found."""
    others = [
        parameter
        for name, parameter in task.named_parameters()
        if used and parameter.requires_grad and name not in used
    ]
    for parameter in others:
        parameter.requires_grad_(False)
    wrapped = DistributedDataParallel(task, find_unused_parameters=not used, gradient_as_bucket_view=True)
    for parameter in others:
        parameter.requires_grad_(True)
    return wrapped


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict of a model on the CPU, in the first process; every process has to call it."""
    weights = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # of what a process has a share
        if rank() == 0:
            weights[name] = whole.cpu()
    return weights
