"""How several processes train one task: replicas (DDP), or each with a share of the weights (FSDP2)."""

from __future__ import annotations

import gc
import math
import os
import warnings
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from bridgetower.distributed import world_size
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.cpu import RecomputedLayerNorm
from bridgetower.model.fusion import FusionLayer

# What a layer returns may be a view, as of a product in oneDNN; nothing is written in its place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def run_device(choice: str) -> torch.device:
    if choice != "auto":
        return torch.device(choice)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def set_numerics(device: torch.device, precision: str, *, deterministic: bool) -> None:
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
        self._graph, self._used = self._graph_now(), set[str]()
        if world_size() > 1:
            self.run = _averaging(task, self._used)

    def __call__(self, *inputs: Any) -> Any:
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

    def _graph_now(self) -> object:
        """Returns what stays the same as long as the same parameters get gradients; None: nothing is known to."""
        # The order in which gloo adds up more than two numbers depends on their place in a bucket, and only buckets of
        # parameters that are looked for never change. So runs on CPUs resume with the same bits.
        by_place = world_size() > 2 and next(self.task.parameters()).device.type == "cpu"
        return None if by_place else getattr(self.task, "graph", None)

    def _follow_graph(self) -> None:
        """Before a pass: looks for parameters without a gradient after a change, and no longer once they are known."""
        if not isinstance(self.run, DistributedDataParallel):
            return
        graph = self._graph_now()
        if graph != self._graph:
            self._graph, self._used = graph, set()
        if self.run.find_unused_parameters is bool(self._used):
            self.run = self.task
            gc.collect()  # the old one refers to itself, and holds memory for all gradients
            self.run = _averaging(self.task, self._used)


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


class Sharded(Replicated):
    """A task of whose weights every process has a share; a layer is whole while it runs.

    What is in no layer, such as embeddings and heads, is whole during a pass and its backward pass. Scalars, such as
    the temperature, cannot be cut and are replicated.
    """

    def __init__(self, task: nn.Module, precision: str = "fp32") -> None:
        self.task = self.run = task
        for parameter in task.parameters():
            dist.broadcast(parameter.data, 0)
        self.scalars = [parameter for parameter in task.parameters() if parameter.ndim == 0]
        ignored = set(self.scalars)
        norms = [module for module in task.modules() if type(module) in (nn.LayerNorm, RecomputedLayerNorm)]
        for norm in norms:  # for its gradients a layer would need weights of the norm before it, which may be away
            norm.__class__ = _LayerNorm
        # Layers are sent and put together in bfloat16, as autocast would read them. Their inputs stay as they are, and
        # so does what is in no layer, such as embeddings and what losses are computed from.
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        policy = half if precision == "bf16" else MixedPrecisionPolicy()
        for model in [module for module in task.modules() if isinstance(module, BridgeTower)]:
            for layer in model.layers():
                fully_shard(layer, ignored_params=ignored, mp_policy=policy)
        fully_shard(task, ignored_params=ignored)
        for module in task.modules():
            for method in ("attend", "key_value") if isinstance(module, FusionLayer) else ():
                register_fsdp_forward_method(module, method)
        if hasattr(task, "features"):
            register_fsdp_forward_method(task, "features")

    def accumulating(self, *, when: bool) -> AbstractContextManager[None]:
        """Adds each pass to the shares, since whole gradients would take the memory saved."""
        return nullcontext()

    def clip_gradients(self, limit: float | None) -> Tensor:
        for scalar in self.scalars:
            if scalar.grad is not None:
                dist.all_reduce(scalar.grad)
                scalar.grad /= world_size()
        kinds = [
            [p for p in self.task.parameters() if p.grad is not None and isinstance(p, DTensor) == sharded]
            for sharded in (True, False)
        ]
        norms: list[Any] = [
            nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds if kind
        ]
        norm = torch.stack([each.full_tensor() if isinstance(each, DTensor) else each for each in norms]).norm()
        for parameters in kinds:
            nn.utils.clip_grads_with_norm_(parameters, math.inf if limit is None else limit, norm)
        return norm

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Puts all weights together: processes run different numbers of batches, so that they cannot gather layers."""
        parts = [module for module in self.task.modules() if isinstance(module, FSDPModule)]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        with super().evaluating():
            yield
        for part in parts:
            part.set_reshard_after_forward(part is not self.task, recurse=False)
            part.reshard()


class _LayerNorm(nn.LayerNorm):
    """Computes in single precision, as autocast does on GPUs, with weights that are put together in half precision."""

    def forward(self, inputs: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return F.layer_norm(inputs, self.normalized_shape, self.weight.to(inputs.dtype), bias, self.eps)
