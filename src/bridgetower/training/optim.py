"""AdamW as in torch and as in transformers, parameter groups, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import look_up
from bridgetower.model.extensions import NO_EXTENSIONS, Extensions
from bridgetower.tasks.run_config import OptimizerConfig
from bridgetower.training.data_parallel import local_rows

# Modules at the rate of the fusion encoder, as in the official `set_schedule`.
_FUSION = ("text_projections.", "image_projections.", "fusion.", "text_pooler.", "image_pooler.")


def parameter_groups(model: BridgeTower, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups the parameters that train by learning rate and weight decay."""
    decayed = _decayed_names(model, config.rule)
    groups: dict[tuple[float, float, type], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        multiplier = 1.0  # of towers, token types and the temperature
        module, _, name_in_module = name.partition(".")
        if name.startswith(_FUSION):
            multiplier = config.fusion_multiplier
        elif module.endswith("_head"):
            spec = model.extensions.head_specs[module.removesuffix("_head")]
            if not name_in_module.startswith(spec.tower_lr):
                multiplier = config.head_multiplier
        lr = config.lr * multiplier
        decay = config.weight_decay if name in decayed else 0.0
        kind = type(parameter.data)  # fused kernels take no mixture of whole and sharded tensors
        group = groups.setdefault(
            (lr, decay, kind), {"params": [], "names": [], "lr": lr, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _decayed_names(model: BridgeTower, rule: str) -> set[str]:
    """Returns the names of the parameters with weight decay.

    `adamw` decays matrices and convolutions; `hf_adamw` all but biases and norms. It does decay the norms of CLIP, and
    of the heads of VQA, SNLI-VE and NLVR2, whose official names are not in the official list.
    """
    if rule == "adamw":
        return {
            name
            for name, weight in model.named_parameters()
            if weight.ndim >= 2
            and name.endswith("weight")
            and ("embedding" not in name or "patch_embedding" in name)
        }
    vision = model.config.vision
    is_clip = vision.architecture == "vit" and vision.pre_norm
    norms = set()
    for path, module in model.named_modules():
        module_name, _, path_in_part = path.partition(".")
        if "norm" not in type(module).__name__.lower() or (is_clip and module_name == "vision"):
            continue
        official_names: Mapping[str, str] = {}
        if module_name.endswith("_head"):
            head = module_name.removesuffix("_head")
            official_names = model.extensions.head_specs[head].published
        if "norm" in official_names.get(path_in_part, "norm").lower():
            norms.add(f"{path}.weight")
    return {
        name
        for name, weight in model.named_parameters()
        if "bias" not in name and (name not in norms or weight.ndim > 1)
    }


def _after_warmup(config: OptimizerConfig, max_steps: int) -> Callable[[int], float]:
    """Returns the factor of a step as transformers computes it: it rises from 0 to 1 and falls again."""
    warmup = int(config.warmup * max_steps)
    end = config.end_lr / config.lr

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        progress = min((step - warmup) / max(1, max_steps - warmup), 1.0)
        if config.schedule == "cosine":
            return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
        return (1 - end) * (1 - progress) ** config.power + end

    return factor


SCHEDULES: dict[str, Callable[[OptimizerConfig, int], Callable[[int], float]]] = {
    "polynomial": _after_warmup,
    "cosine": _after_warmup,
}
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimizerConfig], Optimizer]] = {
    "adamw": lambda groups, config: torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    ),
    "hf_adamw": lambda groups, config: HfAdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps
    ),
}


def schedule(
    config: OptimizerConfig, max_steps: int, extensions: Extensions = NO_EXTENSIONS
) -> Callable[[int], float]:
    build = look_up("optimizer.schedule", config.schedule, SCHEDULES | extensions.schedules)
    return build(config, max_steps)


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, extensions: Extensions = NO_EXTENSIONS
) -> Optimizer:
    """Returns the optimiser of the config's rule. A custom one may regroup the parameters."""
    build = look_up("optimizer.rule", config.rule, OPTIMIZERS | extensions.optimizers)
    optimizer = build(groups, config)
    is_custom = config.rule in extensions.optimizers
    for group in optimizer.param_groups:
        if is_custom and len(group.get("names", ())) != len(group["params"]):
            raise ValueError(
                f"a group of optimiser {config.rule!r} lacks names of its parameters; keep them together"
            )
        group["base_lr"] = group["lr"]
    return optimizer


class HfAdamW(Optimizer):
    """AdamW of transformers 4.17: epsilon before the bias correction, decay after the step at the full rate.

    The rate, the decay and the epsilon that torch's fused kernel gets make it this rule.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_step: dict[int, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(step=torch.tensor(0))  # on the CPU, where it is read
                    state.update(
                        exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
                    )
                state["step"] += 1
                by_step.setdefault(int(state["step"]), []).append(parameter)
            beta1, beta2 = group["betas"]
            decay = group["weight_decay"]
            decay_factor = 1 - group["lr"] * decay
            for step, parameters in by_step.items():
                states = [self.state[parameter] for parameter in parameters]
                device = parameters[0].device
                steps_before = torch.full((len(parameters),), float(step - 1), device=device)
                adamw(
                    [local_rows(parameter) for parameter in parameters],
                    [local_rows(parameter.grad) for parameter in parameters],
                    [local_rows(state["exp_avg"]) for state in states],
                    [local_rows(state["exp_avg_sq"]) for state in states],
                    [],
                    list(steps_before.unbind()),
                    fused=True,
                    lr=group["lr"] * decay_factor,
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=decay / decay_factor,
                    eps=group["eps"] / math.sqrt(1 - beta2**step),
                    amsgrad=False,
                    maximize=False,
                )
