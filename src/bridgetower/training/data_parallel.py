"""How several processes train one task: replicas (DDP), or each with a share of the weights (FSDP2)."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from bridgetower.distributed import world_size
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.cpu import RecomputedLayerNorm
from bridgetower.model.fusion import FusionLayer
from bridgetower.model.heads import ItcHead

# What a layer returns may be a view, as of a product in oneDNN; nothing is written in its place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
warnings.filterwarnings(
    "ignore", message="find_unused_parameters=True was specified"
)  # as other phases need it


def run_device(choice: str) -> torch.device:
    if choice != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if choice == "cuda":
        raise ValueError("device is 'cuda', but PyTorch sees no GPU; use auto or cpu")
    if choice == "cpu":
        return torch.device("cpu")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def set_numerics(device: torch.device, precision: str, *, deterministic: bool) -> None:
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision tf32 is for GPUs, not for {device.type}; use fp32 or bf16")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def local_rows(tensor: Any) -> Tensor:
    """Returns the rows of this process if a tensor is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Replicated:
    """A task whose weights every process has whole; one process alone has nothing to average."""

    def __init__(self, task: nn.Module) -> None:
        self.task, self.run = task, task
        if world_size() > 1:
            # Parameters without a gradient, such as heads that a phase does not use, are looked for in each step. The
            # order in which gloo adds up more than two numbers depends on their place in a bucket, and only buckets of
            # parameters that are looked for never change: so runs on CPUs resume with the same bits.
            self.run = DistributedDataParallel(
                task, find_unused_parameters=True, gradient_as_bucket_view=True
            )

    def __call__(self, *inputs: Any) -> Any:
        return self.run(*inputs)

    def accumulating(self, *, when: bool) -> AbstractContextManager[None]:
        """Returns a context of passes whose gradients wait for the next; those of shares never do, to save memory."""
        return (
            self.run.no_sync()
            if when and isinstance(self.run, DistributedDataParallel)
            else nullcontext()
        )

    def clip_gradients(self, limit: float | None) -> Tensor:
        """Shortens all gradients together to `limit` if there is one; returns their norm of before."""
        return nn.utils.clip_grad_norm_(
            self.task.parameters(), math.inf if limit is None else limit
        )

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switches to evaluation mode, with the whole weights in every process."""
        self.task.eval()
        yield
        self.task.train()


class Sharded(Replicated):
    """A task of whose weights every process has a share; a layer is whole while it runs, the rest during a pass."""

    def __init__(self, task: nn.Module, precision: str = "fp32") -> None:
        self.task = self.run = task
        for parameter in task.parameters():
            dist.broadcast(parameter.data, 0)
        norms = [
            module
            for module in task.modules()
            if type(module) in (nn.LayerNorm, RecomputedLayerNorm)
        ]
        for norm in (
            norms
        ):  # for its gradients a layer would need weights of the norm before it, which may be away
            norm.__class__ = _LayerNorm
        # Layers are sent and put together in bfloat16, as autocast would read them. Their inputs stay as they are, and
        # so does what is in no layer, such as embeddings and what losses are computed from.
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        policy = half if precision == "bf16" else MixedPrecisionPolicy()
        for model in [module for module in task.modules() if isinstance(module, BridgeTower)]:
            for layer in model.layers():
                fully_shard(layer, mp_policy=policy)
        root = fully_shard(task)
        for module in task.modules():
            for method in ("attend", "key_value") if isinstance(module, FusionLayer) else ():
                register_fsdp_forward_method(module, method)
        if hasattr(task, "features"):
            register_fsdp_forward_method(task, "features")
        task.empty_pass = lambda: None  # type: ignore[assignment]
        register_fsdp_forward_method(task, "empty_pass")
        # FSDP expects the whole task to run before any layer of it; a resumed run may begin with an evaluation.
        task.empty_pass()  # type: ignore[operator]
        root.reshard()

    def clip_gradients(self, limit: float | None) -> Tensor:
        # A pass clamps the temperature that was put together; the optimiser changes the shares.
        for module in self.task.modules():
            if isinstance(module, ItcHead):
                module.clamp_temperature()
        norm: Any = super().clip_gradients(limit)
        return norm.full_tensor()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Puts all weights together: processes run different numbers of batches, so that they cannot gather layers."""
        parts = [module for module in self.task.modules() if isinstance(module, FSDPModule)]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        with super().evaluating():
            yield
        # The next backward pass prefetches for the pass before it, which has to be the same in all processes: those
        # without examples to evaluate had none.
        self.task.empty_pass()  # type: ignore[operator]
        for part in parts:
            part.set_reshard_after_forward(part is not self.task, recurse=False)
            part.reshard()


class _LayerNorm(nn.LayerNorm):
    """Computes in single precision, as autocast does on GPUs, with weights that are put together in half precision."""

    def forward(self, inputs: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return F.layer_norm(
            inputs, self.normalized_shape, self.weight.to(inputs.dtype), bias, self.eps
        )
