"""Model configs: the paper's values, what is refused, and the way to JSON and back."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bridgetower.model.bridges import BRIDGES
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import ModelConfig, TextConfig, VisionConfig, check_image_size
from bridgetower.model.presets import (
    BASE,
    LARGE,
    NANO,
    TEXT_TOWERS,
    VISION_TOWERS,
    meter,
    meter_with_norms,
)
from bridgetower.model.towers import TextTransformer, VisionTransformer
from helpers.models import SMALL_CONFIG, changed_config


class TestPresets:
    @pytest.mark.parametrize(("config", "num_tokens"), [(BASE, 325), (LARGE, 442)])
    def test_lengths_and_bridged_layers(self, config, num_tokens):
        depth = config.vision.num_layers
        assert (config.vision.num_tokens, config.text.max_length) == (num_tokens, 512)
        assert config.vision_layers == config.text_layers == tuple(range(depth - 5, depth + 1))

    @pytest.mark.parametrize("bridge", BRIDGES)
    def test_norms_have_the_epsilon_of_their_part(self, bridge):
        epsilons = {
            "vision.layer_norm_eps": 2e-2,
            "text.layer_norm_eps": 3e-2,
            "fusion.layer_norm_eps": 4e-2,
            "fusion.bridge_layer_norm_eps": 5e-2,
            "heads.mlm_layer_norm_eps": 6e-2,
        }
        model = BridgeTower(SMALL_CONFIG.override({**epsilons, "fusion.bridge": bridge}))
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm):
                part = name.partition(".")[0].replace("_head", "")
                field = {"mlm": "heads.mlm_layer_norm_eps"}.get(part, f"{part}.layer_norm_eps")
                if part == "fusion" and "_layers." not in name:
                    field = "fusion.bridge_layer_norm_eps"
                assert module.eps == epsilons[field], name

    @pytest.mark.parametrize("config", [BASE, LARGE, NANO], ids=["base", "large", "nano"])
    def test_meter_and_its_control(self, config):
        baseline = meter(config)
        control = meter_with_norms(config)
        assert (baseline.fusion.bridge, baseline.fusion.input_norm) == (None, False)
        assert (control.fusion.bridge, control.fusion.input_norm) == ("norm", True)
        assert replace(control.fusion, bridge=config.fusion.bridge) == config.fusion
        for changed in (baseline, control):
            assert changed.vision_layers + changed.text_layers == (
                config.vision.num_layers,
                config.text.num_layers,
            )
            assert (changed.vision, changed.text, changed.heads) == (
                config.vision,
                config.text,
                config.heads,
            )
        meter_config = meter(
            config.override({"fusion.vision_layers": (1, *config.vision_layers[1:])})
        )
        assert meter_config.vision_layers == config.vision_layers[-1:], (
            "the last of those that are read"
        )

    def test_towers_of_the_published_models(self):
        assert replace(VISION_TOWERS["clip-b16"], image_size=288) == BASE.vision
        assert replace(VISION_TOWERS["clip-l14"], image_size=294) == LARGE.vision
        assert (TEXT_TOWERS["roberta-base"], TEXT_TOWERS["roberta-large"]) == (
            BASE.text,
            LARGE.text,
        )

    @pytest.mark.parametrize(
        ("name", "millions"),
        [
            ("clip-b16", 86),
            ("clip-b32", 87),
            ("clip-l14", 303),
            ("vit-b16", 86),
            ("vit-b32", 87),
            ("vit-l16", 303),
            ("deit-b16", 86),
            ("deit-b16-distilled", 86),
            ("roberta-base", 124),
            ("roberta-large", 354),
            ("bert-base", 109),
            ("bert-large", 334),
        ],
    )
    def test_size_of_every_tower(self, name, millions):
        with torch.device("meta"):
            vision = VISION_TOWERS.get(name)
            tower = VisionTransformer(vision) if vision else TextTransformer(TEXT_TOWERS[name])
        assert round(sum(parameter.numel() for parameter in tower.parameters()) / 1e6) == millions


class TestDerived:
    def test_lengths(self):
        assert TextConfig(max_positions=514, pad_token_id=1).max_length == 512
        assert TextConfig(max_positions=514, pad_token_id=0).max_length == 513
        assert TextConfig(max_positions=512, pad_token_id=0, positions="bert").max_length == 512

    @given(grid=st.integers(1, 30), patch=st.integers(1, 40), distilled=st.booleans())
    def test_image_tokens(self, grid, patch, distilled):
        config = VisionConfig(
            image_size=grid * patch, patch_size=patch, distillation_token=distilled
        )
        assert config.num_tokens == grid**2 + 1 + distilled


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        json.loads((Path(__file__).parent / "refused.json").read_text())["settings"],
    )
    def test_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            SMALL_CONFIG.override(changes)

    @pytest.mark.parametrize(
        "field",
        [
            *(
                f"{section}.{name}"
                for section in ("vision", "text", "fusion")
                for name in ("hidden_size", "num_layers")
            ),
            *(
                f"{section}.{name}"
                for section in ("vision", "text", "fusion")
                for name in ("num_heads", "layer_norm_eps")
            ),
            *(f"{section}.intermediate_size" for section in ("vision", "text", "fusion")),
            "vision.image_size",
            "vision.patch_size",
            "text.vocab_size",
            "text.type_vocab_size",
            "text.max_positions",
            "fusion.bridge_layer_norm_eps",
            "heads.itc_size",
            "heads.mlm_layer_norm_eps",
        ],
    )
    def test_out_of_bounds(self, field):
        for value in (0, -1, math.nan, math.inf, 10**30, True, "4", None):
            with pytest.raises(
                ValueError,
                match=rf"{field} is {value!r}; expected a (whole )?number from \S+ to \S+$",
            ):
                SMALL_CONFIG.override({field: value})

    def test_layers_that_are_no_numbers(self):
        for layers in (3, "34", ("3", 4), (3.0, 4), [3, None]):
            with pytest.raises(ValueError, match="expected 2 tower layers"):
                SMALL_CONFIG.override({"fusion.vision_layers": layers})

    @settings(max_examples=100, deadline=None)
    @given(size=st.integers(-50, 3000), patch=st.integers(1, 40))
    def test_image_sizes(self, size, patch):
        """The two sizes that the message names are multiples, positive, and the nearest."""
        if size > 0 and size % patch == 0:
            check_image_size(size, patch)
            return
        with pytest.raises(ValueError, match="is not a multiple of the patch size") as caught:
            check_image_size(size, patch)
        lower, upper = (
            int(word)
            for word in str(caught.value).rpartition("set image_size to ")[2].split(" or ")
        )
        assert upper - lower == patch
        assert lower >= patch
        assert lower % patch == 0
        assert lower < size < upper or size < patch


def test_override_leaves_the_rest():
    changes = {
        "text.num_heads": 2,
        "vision.hidden_size": 25,
        "vision.num_heads": 5,
        "fusion.text_layers": [1, 3],
    }
    assert SMALL_CONFIG.override(changes) == replace(
        SMALL_CONFIG,
        text=replace(SMALL_CONFIG.text, num_heads=2),
        vision=replace(SMALL_CONFIG.vision, hidden_size=25, num_heads=5),
        fusion=replace(SMALL_CONFIG.fusion, text_layers=(1, 3)),
    )
    assert SMALL_CONFIG.override({}) == SMALL_CONFIG


class TestJson:
    @pytest.mark.parametrize(
        "config",
        [
            BASE,
            LARGE,
            NANO,
            meter(BASE),
            changed_config(fusion__vision_layers=(1, 4), heads__itc="fused"),
        ],
        ids=["base", "large", "nano", "meter", "chosen layers"],
    )
    def test_round_trip(self, config):
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    def test_unknown_fields(self):
        with pytest.raises(
            ValueError, match=r"model config has unknown fields \['audio'\]; known: .*'vision'"
        ):
            ModelConfig.from_dict({"audio": {}})

    def test_values_are_checked(self):
        with pytest.raises(
            ValueError, match=r"vision.hidden_size 24 is not a multiple of vision.num_heads 5"
        ):
            ModelConfig.from_dict({"vision": {"hidden_size": 24, "num_heads": 5}})
        with pytest.raises(
            ValueError, match=r"model config\.text\.hidden_size is '768'; expected int$"
        ):
            ModelConfig.from_dict({"text": {"hidden_size": "768"}})
