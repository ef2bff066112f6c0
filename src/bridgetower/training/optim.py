"""AdamW in torch's and transformers' form, its parameter groups, its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import entry
from bridgetower.model.extensions import NO_EXTENSIONS, Extensions
from bridgetower.tasks.run_config import OptimizerConfig

# Official `set_schedule`: a learning rate per part of the model, decided by the parameter's official name.
_FUSION = ("text_projections.", "image_projections.", "fusion.", "text_pooler.", "image_pooler.")


def parameter_groups(model: BridgeTower, config: OptimizerConfig) -> list[dict[str, Any]]:
    decayed = _decayed(model, config.rule)
    groups: dict[tuple[float, float, type], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr, (module, _, of_head) = (
            config.lr,
            name.partition("."),
        )  # of towers, token types and the temperature
        if name.startswith(_FUSION):
            lr *= config.fusion_multiplier
        elif module.endswith("_head"):
            of_towers = of_head.startswith(model.head_specs[module.removesuffix("_head")].tower_lr)
            lr *= 1.0 if of_towers else config.head_multiplier
        decay = config.weight_decay if name in decayed else 0.0
        kind = type(parameter.data)  # fused kernels take no mixture of whole and sharded ones
        group = groups.setdefault(
            (lr, decay, kind), {"params": [], "names": [], "lr": lr, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _decayed(model: BridgeTower, rule: str) -> set[str]:
    """Returns the names of the parameters to which weight decay applies.

    `adamw` decays matrices and convolutions; `hf_adamw` all but biases and norms. It does decay the norms of CLIP, and
    those in the heads of VQA, SNLI-VE and NLVR2, whose official names are not in the official list.
    """
    parameters = dict(model.named_parameters())
    if rule == "adamw":
        matrices = {
            name
            for name, weight in parameters.items()
            if weight.ndim >= 2 and name.endswith("weight")
        }
        return {name for name in matrices if "embedding" not in name or "patch_embedding" in name}
    spared = set()
    for path in (
        path for path, module in model.named_modules() if "norm" in type(module).__name__.lower()
    ):
        part, _, module = path.partition(".")
        published = (
            model.head_specs[part.removesuffix("_head")].published if part.endswith("_head") else {}
        )
        clip = (
            part == "vision"
            and model.config.vision.architecture == "vit"
            and model.config.vision.pre_norm
        )
        if not clip and "norm" in published.get(module, "norm").lower():
            spared.add(f"{path}.weight")
    return {
        name
        for name, weight in parameters.items()
        if "bias" not in name and (name not in spared or weight.ndim > 1)
    }


def _after_warmup(config: OptimizerConfig, max_steps: int) -> Callable[[int], float]:
    """Gives the factor of a step as transformers computes it: from 0 at step 0 to 1, and then down."""
    warmup, end = int(config.warmup * max_steps), config.end_lr / config.lr

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        done = min((step - warmup) / max(1, max_steps - warmup), 1.0)
        if config.schedule == "cosine":
            return max(0.0, 0.5 * (1 + math.cos(math.pi * done)))
        return (1 - end) * (1 - done) ** config.power + end

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
    return entry("optimizer.schedule", config.schedule, SCHEDULES | extensions.schedules)(
        config, max_steps
    )


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, extensions: Extensions = NO_EXTENSIONS
) -> Optimizer:
    """Returns the optimiser of the config's rule; a custom one may put the same parameters in groups of its own."""
    optimizer = entry("optimizer.rule", config.rule, OPTIMIZERS | extensions.optimizers)(
        groups, config
    )
    for group in optimizer.param_groups:
        if config.rule in extensions.optimizers and len(group.get("names", ())) != len(
            group["params"]
        ):
            raise ValueError(
                f"a group of optimiser {config.rule!r} lacks names of its parameters; keep them together"
            )
        group["base_lr"] = group["lr"]
    return optimizer


class HfAdamW(Optimizer):
    """AdamW of transformers 4.17: epsilon before the bias correction, decay after the step at the full rate.

    It is torch's fused kernel, one launch for many weights, at a rate, a decay and an epsilon that make it this rule.
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
            (beta1, beta2), decay = group["betas"], group["weight_decay"]
            left = 1 - group["lr"] * decay
            for step, parameters in by_step.items():
                states = [self.state[parameter] for parameter in parameters]
                torch._fused_adamw_(
                    [_share(parameter) for parameter in parameters],
                    [_share(parameter.grad) for parameter in parameters],
                    [_share(state["exp_avg"]) for state in states],
                    [_share(state["exp_avg_sq"]) for state in states],
                    [],
                    [torch.full((), float(step), device=parameters[0].device)] * len(parameters),
                    lr=group["lr"] * left,
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=decay / left,
                    eps=group["eps"] / math.sqrt(1 - beta2**step),
                    amsgrad=False,
                    maximize=False,
                )


def _share(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
