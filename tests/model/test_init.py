"""Initial weights: all of them drawn, from the given generator only, with the intended spreads."""

import math

import pytest
import torch

from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.presets import BASE
from helpers.models import SMALL_CONFIG, changed_config, same_tensors


def initialised(config=SMALL_CONFIG, seed=0, start=float("nan")):
    """A model whose weights were all `start` before they were drawn, but for learned scalars."""
    model = BridgeTower(config)
    for parameter in model.parameters():
        if parameter.numel() > 1:
            parameter.data.fill_(start)
    model.reset_parameters(torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize(
    "config",
    [
        SMALL_CONFIG,
        changed_config(
            heads__itc="fused", fusion__bridge="interpolate", fusion__separate_projections=True
        ),
        changed_config(
            fusion__bridge=None,
            fusion__input_norm=False,
            vision__patch_bias=True,
            vision__pre_norm=False,
        ),
        changed_config(fusion__bridge="norm", vision__distillation_token=True),
        changed_config(fusion__bridge="concatenate"),
    ],
    ids=["tower", "fused", "meter", "norms_distilled", "concatenate"],
)
def test_every_weight_is_set_as_the_seed_says(config):
    first = initialised(config).state_dict()
    again = initialised(config, start=3.0).state_dict()
    other = initialised(config, seed=2)
    assert [name for name, value in first.items() if not value.isfinite().all()] == []
    assert same_tensors(first, again), "where it starts does not matter"
    changed = {
        name for name, value in first.items() if not torch.equal(value, other.state_dict()[name])
    }
    fixed = {
        name
        for name in first
        if name.endswith("bias") or "norm" in name or first[name].numel() == 1
    }
    assert changed == first.keys() - fixed


def test_only_the_given_generator_is_used():
    torch.manual_seed(5)
    model = BridgeTower(SMALL_CONFIG)
    before = torch.get_rng_state()
    model.reset_parameters(torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_scalars_keep_their_start():
    model = initialised(changed_config(fusion__bridge="scaled_add"))
    assert model.itc_head.temperature.item() == pytest.approx(0.07)
    assert model.fusion.text_bridges[0].scale.item() == 1
    manager = BridgeTower(changed_config(fusion__bridge="static_manager")).fusion.text_bridges[1]
    assert (manager.weights == 1 / len(manager.weights)).all()
    assert (manager.stream_weight == 1).all()


def test_a_new_model_has_its_weights():
    config = changed_config(vision__distillation_token=True)
    built = BridgeTower(config, generator=torch.Generator().manual_seed(0))
    assert same_tensors(built.state_dict(), initialised(config).state_dict())
    seeded = []
    for _ in range(2):
        torch.manual_seed(0)
        seeded.append(BridgeTower(config).state_dict())
    assert same_tensors(*seeded)


class TestSpreads:
    @staticmethod
    def close(weights, spread):
        return abs(weights.std().item() / spread - 1) < 5 / math.sqrt(2 * weights.numel())

    @pytest.mark.parametrize(("text", "fusion"), [(96, 48), (800, 96)])
    def test_text_and_fusion(self, text, fusion):
        """0.02 at a width of 768 and above, larger below, as the square root of the width asks for."""
        model = initialised(
            changed_config(text__hidden_size=text, fusion__hidden_size=fusion, text__vocab_size=300)
        )
        for module, width in (
            (model.text.layers[0].attention.qkv, text),
            (model.text.word_embedding, text),
            (model.fusion.image_layers[1].cross_attention.key_value, fusion),
            (model.image_projections[0], fusion),
            (model.mlm_head.decoder, fusion),
        ):
            assert self.close(module.weight, 0.02 * math.sqrt(768 / min(width, 768)))
            assert text == 800 or not self.close(module.weight, 0.02), "control"

    def test_base(self):
        config = BASE.override(
            {f"{section}.num_layers": 2 for section in ("vision", "text", "fusion")}
            | {
                "fusion.vision_layers": (1, 2),
                "fusion.text_layers": (1, 2),
                "text.vocab_size": 2000,
            }
        )
        width = 768**-0.5
        branch = 768**-0.5 / math.sqrt(2 * 2)
        vision = {
            "class_embedding": width,
            "position_embedding": width,
            "patch_embedding.weight": (3 * 16 * 16) ** -0.5,
            "attention.qkv.weight": width,
            "attention.out.weight": branch,
            "mlp.up.weight": (2 * 768) ** -0.5,
            "mlp.down.weight": branch,
        }
        wrong = []
        for name, weights in BridgeTower(config).named_parameters():
            section, _, parameter_name = name.partition(".")
            if name.endswith(".bias"):
                right = not weights.any()
            elif "norm" in name:
                right = bool((weights == 1).all())
            elif section == "vision":
                right = self.close(
                    weights,
                    next(spread for end, spread in vision.items() if parameter_name.endswith(end)),
                )
            else:
                right = weights.numel() == 1 or self.close(weights, 0.02)
            wrong += [] if right else [name]
        assert wrong == []
