"""Weights, gradients and optimiser state shared out over the processes: FSDP2, layer by layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from bridgetower.distributed import world_size
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.cpu_linear import RecomputedLayerNorm
from bridgetower.model.fusion import FusionLayer
from bridgetower.training.data_parallel import Replicated

# What a layer returns may be a view, as of a product in oneDNN; nothing is written in its place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


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
        models = [module for module in task.modules() if isinstance(module, BridgeTower)]
        # Layers are sent and put together in bfloat16, as autocast would read them. Their inputs stay as they are, and
        # so does what is in no layer, such as embeddings and what losses are computed from.
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        policy = half if precision == "bf16" else MixedPrecisionPolicy()
        for layer in (layer for model in models for layer in model.layers()):
            fully_shard(layer, ignored_params=ignored, mp_policy=policy)
        fully_shard(task, ignored_params=ignored)
        for module in task.modules():
            for method in ("attend", "key_value") if isinstance(module, FusionLayer) else ():
                register_fsdp_forward_method(module, method)
        if hasattr(task, "features"):
            register_fsdp_forward_method(task, "features")

    def accumulating(self, *, when: bool) -> AbstractContextManager[None]:
        """See `Replicated`; here each pass adds to the shares, since whole gradients would take the memory saved."""
        return nullcontext()

    def clip_gradients(self, limit: float | None) -> Tensor:
        """See `Replicated`."""
        for scalar in self.scalars:
            if scalar.grad is not None:
                dist.all_reduce(scalar.grad)
                scalar.grad /= world_size()
        kinds = [
            [p for p in self.task.parameters() if p.grad is not None and isinstance(p, DTensor) == sharded]
            for sharded in (True, False)
        ]
        norm = torch.stack([_norm(parameters) for parameters in kinds if parameters]).norm()
        for parameters in kinds:
            nn.utils.clip_grads_with_norm_(parameters, math.inf if limit is None else limit, norm)
        return norm

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """See `Replicated`; processes run different numbers of batches, so that they cannot gather each layer."""
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


def _norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
