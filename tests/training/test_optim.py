"""Optimisers, parameter groups and learning-rate schedules against their formulas."""

import math
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.library_towers import timm_config, transformers_config
from bridgetower.model.presets import meter
from bridgetower.tasks.run_config import OptimizerConfig
from bridgetower.training.optim import HfAdamW, build_optimizer, parameter_groups, schedule
from helpers.checkpoints import TEXT_FAMILIES
from helpers.shapes import SHAPES_MODEL

MODELS = {
    "tower": SHAPES_MODEL,
    "fused": SHAPES_MODEL.override({"heads.itc": "fused"}),
    "headless": SHAPES_MODEL.override({"heads.itc": None, "heads.mlm": False, "heads.itm": False}),
    "meter": meter(SHAPES_MODEL),
    "interpolate": SHAPES_MODEL.override(
        {"fusion.bridge": "interpolate", "fusion.separate_projections": True}
    ),
    "managers": SHAPES_MODEL.override({"fusion.bridge": "adaptive_manager"}),
    "timm": SHAPES_MODEL.override({"vision.pre_norm": False, "vision.patch_bias": True}),
}


def with_names(config, model_config=SHAPES_MODEL):
    groups = parameter_groups(BridgeTower(model_config), config)
    return {
        name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]
    }


class TestOfficialRule:
    @staticmethod
    def reference(start, gradients, rates, decay):
        """The AdamW of transformers 4.17 in double precision, from its description."""
        beta1 = 0.9
        beta2 = 0.98
        epsilon = 1e-8
        value = start.copy()
        mean = np.zeros_like(start)
        square = np.zeros_like(start)
        for number, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
            mean = beta1 * mean + (1 - beta1) * gradient
            square = beta2 * square + (1 - beta2) * gradient**2
            size = rate * math.sqrt(1 - beta2**number) / (1 - beta1**number)
            value = value - size * mean / (np.sqrt(square) + epsilon)
            value = value - rate * decay * value
        return value

    @staticmethod
    def run(rule, gradients, start, rates, decay):
        parameter = nn.Parameter(torch.tensor(start))
        config = OptimizerConfig(lr=1.0, rule=rule)
        optimizer = build_optimizer(
            [{"params": [parameter], "lr": 1.0, "weight_decay": decay}], config
        )
        for gradient, rate in zip(gradients, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            parameter.grad = torch.tensor(gradient)
            optimizer.step()
        return parameter.detach().numpy()

    @pytest.mark.parametrize("decay", [0.0, 0.3])
    @pytest.mark.parametrize(
        "scale", [1.0, 1e-8]
    )  # at the smaller one, where epsilon is added matters
    def test_equals_the_reference(self, decay, scale):
        rng = np.random.default_rng(0)
        start = rng.normal(size=(4, 3))
        gradients = [scale * rng.normal(size=(4, 3)) for _ in range(6)]
        rates = [0.0, 0.02, 0.05, 0.04, 0.02, 0.01]
        expected = self.reference(start, gradients, rates, decay)
        np.testing.assert_allclose(
            self.run("hf_adamw", gradients, start, rates, decay), expected, rtol=1e-9
        )
        if decay or scale < 1:
            plain = self.run("adamw", gradients, start, rates, decay)
            assert np.abs(plain - expected).max() > 1e-4  # torch's AdamW is another rule

    def test_parameters_without_gradient_stay(self):
        still = nn.Parameter(torch.ones(2))
        moved = nn.Parameter(torch.ones(2))
        optimizer = HfAdamW(
            [{"params": [still, moved], "weight_decay": 0.5}], lr=0.1, betas=(0.9, 0.98), eps=1e-8
        )
        moved.grad = torch.ones(2)
        optimizer.step()
        assert torch.equal(still, torch.ones(2))
        assert (moved < 1).all()


class TestGroups:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("rule", ["adamw", "hf_adamw"])
    def test_every_parameter_that_learns_is_in_exactly_one_group(self, name, rule):
        model = BridgeTower(MODELS[name])
        model.vision.patch_embedding.requires_grad_(False)
        groups = parameter_groups(model, OptimizerConfig(rule=rule))
        names = [entry for group in groups for entry in group["names"]]
        parameters = dict(model.named_parameters())
        assert sorted(names) == sorted(
            key for key in parameters if not key.startswith("vision.patch_embedding.")
        )
        for group in groups:
            assert all(
                parameters[key] is value
                for key, value in zip(group["names"], group["params"], strict=True)
            )

    @pytest.mark.parametrize("name", MODELS)
    def test_plain_rule_decays_matrices_and_the_patch_convolution_only(self, name):
        model = BridgeTower(MODELS[name])
        kinds = (nn.Linear, nn.Conv2d)
        expected = {
            f"{path}.weight" for path, module in model.named_modules() if isinstance(module, kinds)
        }
        decayed = {
            key for key, (_, decay) in with_names(OptimizerConfig(), MODELS[name]).items() if decay
        }
        assert decayed == expected
        assert "vision.patch_embedding.weight" in decayed

    @pytest.mark.parametrize("bridge", ["static_manager", "adaptive_manager"])
    def test_official_rule_spares_norms_without_an_official_name(self, bridge):
        pytest.importorskip("transformers")
        vision = timm_config(
            "vit_tiny_patch16_224", {"embed_dim": 12, "depth": 2, "num_heads": 2}, 32
        )
        text = transformers_config({"model_type": "electra", **TEXT_FAMILIES["electra"](Random(0))})
        vision = replace(vision, pre_norm=True)  # the default, which a custom tower keeps
        config = replace(SHAPES_MODEL.override({"fusion.bridge": bridge}), vision=vision, text=text)
        model = BridgeTower(config)
        norms = {path for path, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
        for prefix in ("vision.", "text.", "fusion.", "mlm_head."):
            assert any(path.startswith(prefix) for path in norms), prefix
        spared = {
            key
            for key, (_, decay) in with_names(OptimizerConfig(rule="hf_adamw"), config).items()
            if not decay
        }
        biases = {key for key, _ in model.named_parameters() if key.endswith("bias")}
        assert spared == {f"{path}.weight" for path in norms} | biases

    def test_learning_rates(self):
        config = OptimizerConfig(lr=2.0, head_multiplier=50, fusion_multiplier=5)
        rates = {key: lr for key, (lr, _) in with_names(config).items()}
        multipliers = dict.fromkeys(
            ("vision.", "text.", "token_type_embedding.", "itc_head.temperature"), 2.0
        )
        multipliers |= dict.fromkeys(
            ("itc_head.image", "itc_head.text", "itm_head.", "mlm_head."), 100.0
        )
        fusion_prefixes = (
            "fusion.",
            "text_projections.",
            "image_projections.",
            "text_pooler.",
            "image_pooler.",
        )
        multipliers |= dict.fromkeys(fusion_prefixes, 10.0)
        for key, rate in rates.items():
            (prefix,) = [prefix for prefix in multipliers if key.startswith(prefix)]
            assert rate == multipliers[prefix], key
        assert all(any(key.startswith(prefix) for key in rates) for prefix in multipliers)


class TestSchedule:
    @pytest.mark.parametrize(
        ("config", "steps", "expected"),
        [
            (OptimizerConfig(warmup=0.0), 1, [1]),
            (
                OptimizerConfig(warmup=0, power=2, end_lr=1e-6),
                10,
                [0.1 + 0.9 * (1 - n / 10) ** 2 for n in range(11)],
            ),
        ],
    )
    def test_values(self, config, steps, expected):
        assert list(map(schedule(config, steps), range(len(expected)))) == pytest.approx(expected)

    @given(
        warmup=st.floats(0, 0.9),
        steps=st.integers(100, 400),
        power=st.sampled_from([0.5, 1.0, 2.0]),
        kind=st.sampled_from(["polynomial", "cosine"]),
    )
    def test_rises_to_one_and_falls_without_jumps(self, warmup, steps, power, kind):
        config = OptimizerConfig(
            warmup=warmup, schedule=kind, power=power if kind == "polynomial" else 1.0
        )
        factors = list(map(schedule(config, steps), range(steps + 5)))
        top = int(warmup * steps)
        assert factors[top] == max(factors) == 1
        assert factors[: top + 1] == pytest.approx(
            [step / max(top, 1) for step in range(top)] + [1]
        )
        assert factors[top:] == sorted(factors[top:], reverse=True)
        assert factors[steps:] == pytest.approx([0] * 5, abs=1e-12)
        if power >= 1:  # a root falls steeply at its very end
            gaps = [
                a - b for a, b in zip(factors[top:steps], factors[top + 1 : steps + 1], strict=True)
            ]
            assert max(gaps) < 2.1 / (steps - top)


@pytest.mark.parametrize("rule", ["adamw", "hf_adamw"])
def test_the_optimiser_keeps_two_numbers_per_weight_and_no_copy_of_them(rule):
    model = BridgeTower(SHAPES_MODEL)
    config = OptimizerConfig(rule=rule)
    optimizer = build_optimizer(parameter_groups(model, config), config)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    for parameter in model.parameters():
        sizes = [
            value
            for value in optimizer.state[parameter].values()
            if isinstance(value, Tensor) and value.ndim
        ]
        assert sum(value.numel() for value in sizes) <= 2 * max(parameter.numel(), 1)
