"""Training of one task by several processes: replicas (DDP), or sharded weights (FSDP2)."""

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

# A layer may return a view, as of a product in oneDNN. Nothing is written in its place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
# Some phases of a run use all parameters, others do not.
warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")


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
    """A task with all weights in every process, which averages the gradients of several processes."""

    def __init__(self, task: nn.Module) -> None:
        self.task = task
        self.run = task
        if world_size() > 1:
            # DDP looks in each step for parameters without a gradient, such as heads that a phase does not use. Its
            # buckets then never change. As the order in which gloo adds numbers depends on the buckets, runs on CPUs
            # resume with the same bits.
            self.run = DistributedDataParallel(
                task, find_unused_parameters=True, gradient_as_bucket_view=True
            )

    def __call__(self, *inputs: Any) -> Any:
        return self.run(*inputs)

    def accumulating(self, *, when: bool) -> AbstractContextManager[None]:
        """Returns a context in which DDP averages no gradients. FSDP always does, to save memory."""
        if when and isinstance(self.run, DistributedDataParallel):
            return self.run.no_sync()
        return nullcontext()

    def clip_gradients(self, limit: float | None) -> Tensor:
        """Scales the gradients to a norm of at most `limit`, and returns the norm before."""
        return nn.utils.clip_grad_norm_(
            self.task.parameters(), math.inf if limit is None else limit
        )

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switches to evaluation mode, with all weights in every process."""
        self.task.eval()
        yield
        self.task.train()


class Sharded(Replicated):
    """A task with sharded weights: a layer is gathered while it runs, all other modules during a pass."""

    def __init__(self, task: nn.Module, precision: str = "fp32") -> None:
        self.task = self.run = task
        for parameter in task.parameters():
            dist.broadcast(parameter.data, 0)
        # The gradients of a layer must not need weights of the norm before it, which may be sharded again by then.
        for module in task.modules():
            if type(module) in (nn.LayerNorm, RecomputedLayerNorm):
                module.__class__ = _LayerNorm
        # Layers are gathered in bfloat16, as autocast would read them. Their inputs stay as they are, and so does all
        # that is in no layer, such as embeddings and the inputs of losses.
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        policy = half if precision == "bf16" else MixedPrecisionPolicy()
        for module in list(task.modules()):
            if isinstance(module, BridgeTower):
                for layer in module.layers():
                    fully_shard(layer, mp_policy=policy)
        root = fully_shard(task)
        for module in task.modules():
            if isinstance(module, FusionLayer):
                register_fsdp_forward_method(module, "attend")
                register_fsdp_forward_method(module, "key_value")
        if hasattr(task, "features"):
            register_fsdp_forward_method(task, "features")
        task.empty_pass = lambda: None  # type: ignore[assignment]
        register_fsdp_forward_method(task, "empty_pass")
        # FSDP expects a pass of the whole task before one of a layer, and a resumed run may begin with an evaluation.
        task.empty_pass()  # type: ignore[operator]
        root.reshard()

    def clip_gradients(self, limit: float | None) -> Tensor:
        # A pass clamps the gathered temperature, but the optimiser changes the sharded one.
        for module in self.task.modules():
            if isinstance(module, ItcHead):
                module.clamp_temperature()
        norm: Any = super().clip_gradients(limit)
        return norm.full_tensor()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Gathers all weights, as processes run different numbers of batches and cannot gather layers together."""
        modules = [module for module in self.task.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        with super().evaluating():
            yield
        # The next backward pass prefetches for the last forward pass, which has to be the same in all processes, also
        # in those without examples to evaluate.
        self.task.empty_pass()  # type: ignore[operator]
        for module in modules:
            module.set_reshard_after_forward(module is not self.task, recurse=False)
            module.reshard()


class _LayerNorm(nn.LayerNorm):
    """Computes in single precision, as autocast does on GPUs, with weights that are gathered in half precision."""

    def forward(self, inputs: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return F.layer_norm(
            inputs, self.normalized_shape, self.weight.to(inputs.dtype), bias, self.eps
        )
