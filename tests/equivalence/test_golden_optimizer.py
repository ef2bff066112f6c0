"""Case l: learning rate and decay of every parameter, and the schedule."""

from dataclasses import replace
from fnmatch import fnmatch

import pytest
from recompute import optimizer_config

from bridgetower.checkpoints.keymap import name_table
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.tasks.table import RECIPES
from bridgetower.training.optim import build_optimizer, parameter_groups, schedule
from golden import case

# Recorded groups -> the case whose checkpoint holds that model.
MODELS = {
    "pretrain": "a_pretrain",
    "itc": "b_itc",
    "vqa_snli": "c_vqa",
    "nlvr2": "e_nlvr2",
    "irtr": "f_irtr",
    "ln_separate": "g_ln_separate",
    "timm_vit": "h_timm_vit",
    "bert": "i_bert",
    "meter": "j_meter",
}

# Recorded groups -> the recipe with the same run config.
RECORDED_RECIPES = {
    "pretrain": "pretrain-base",
    "itc": "pretrain-base-itc",
    "vqa_snli": "vqav2-base",
    "nlvr2": "nlvr2",
}

# Official parameters that this package's model does not have, because nothing that it computes reads them.
LEFT_OVERS = (
    "vit_model.positional_embedding",  # of CLIP's text side
    "vit_model.ln_final.*",  # of CLIP's text side
    "vit_model.visual.ln_separate.*",  # used by a path that no training takes
    "text_transformer.pooler.*",
)


def recorded_groups(name):
    return case("l_optimizer").json(f"groups_{name}.json")


def build_groups(name):
    official = recorded_groups(name)["params"]
    checkpoint = case(MODELS[name]).checkpoint
    heads = {"mlm": "mlm_score.bias", "itm": "itm_score.fc.weight"}
    return BridgeTower(
        checkpoint.config.override(
            {f"heads.{head}": key in official for head, key in heads.items()}
        )
    )


def our_groups(name, model, **changes):
    """Official name -> [multiplier, decay], from our rule."""
    config = groups_config(name, **changes)
    naming = case(MODELS[name]).naming
    table = name_table(model.state_dict(), naming)
    groups = parameter_groups(model, config)
    return {
        official: [group["lr"] / config.lr, group["weight_decay"]]
        for group in groups
        for ours in group["names"]
        for official in table[ours].names
    }


def groups_config(name, **changes):
    # Only the schedule, which is not looked at here, depends on the number of steps.
    return replace(optimizer_config(recorded_groups(name)["config"], max_steps=1000), **changes)


def disagreeing(ours, official):
    return [
        name
        for name, values in ours.items()
        if values != pytest.approx(official[name][:2], rel=1e-6, abs=0)
    ]


class TestGroups:
    def test_every_recorded_model_is_compared(self):
        files = case("l_optimizer").meta["files"]
        assert set(files) == {"schedule.json", *(f"groups_{name}.json" for name in MODELS)}

    @pytest.mark.parametrize("name", MODELS)
    def test_every_parameter_is_in_one_group_with_its_multiplier_and_decay(self, name):
        recorded = recorded_groups(name)
        config = groups_config(name)
        model = build_groups(name)
        official = recorded["params"]
        ours = our_groups(name, model)
        groups = parameter_groups(model, config)
        assert disagreeing(ours, official) == []
        left_overs = (*LEFT_OVERS, *(("temperature",) if model.itc_head is None else ()))
        unused = {key for key in official if any(fnmatch(key, pattern) for pattern in left_overs)}
        assert set(official) - set(ours) == unused
        grouped = [entry for group in groups for entry in group["names"]]
        assert sorted(grouped) == sorted(key for key, _ in model.named_parameters())
        assert recorded["in_no_group"] == []
        defaults = build_optimizer(groups, config).defaults
        expected = {
            key: recorded["defaults"][key] for key in ("lr", "betas", "eps", "weight_decay")
        }
        assert {key: defaults[key] for key in expected} | {
            "betas": list(defaults["betas"])
        } == expected
        # Controls: decay as in torch, and the other image tower.
        of_torch = disagreeing(our_groups(name, model, rule="adamw"), official)
        assert "text_transformer.embeddings.word_embeddings.weight" in of_torch
        model.config = model.config.override({"vision.pre_norm": not model.config.vision.pre_norm})
        wrong = disagreeing(our_groups(name, model), official)
        assert wrong != []
        assert all(name.startswith("vit_model.") for name in wrong)

    @pytest.mark.parametrize("change", ["head_multiplier", "fusion_multiplier"])
    def test_control_another_multiplier_fails(self, change):
        official = recorded_groups("pretrain")["params"]
        model = build_groups("pretrain")
        assert disagreeing(our_groups("pretrain", model, **{change: 3.0}), official) != []


class TestRecipes:
    """The recorded run configs are those of recipes, so that what holds for the ones holds for the others."""

    @pytest.mark.parametrize("name", RECORDED_RECIPES)
    def test_optimiser_is_the_recorded_one(self, name):
        assert RECIPES[RECORDED_RECIPES[name]].optimizer == groups_config(name)

    def test_schedule_of_the_paper_is_the_recorded_one(self):
        assert RECIPES["snli-ve"].optimizer != groups_config("vqa_snli")  # control
        recorded = case("l_optimizer").json("schedule.json")["polynomial_warmup0.1"]
        assert wrong_steps(recorded, RECIPES["pretrain-base"].optimizer) == []
        assert wrong_steps(recorded, RECIPES["vqav2-base"].optimizer) != []


class TestSchedule:
    def test_learning_rate_at_each_step(self):
        schedules = case("l_optimizer").json("schedule.json")
        assert schedules.pop("float_multiplier_quirk")
        for name, recorded in schedules.items():
            config = optimizer_config(recorded["config"], recorded["max_steps"])
            assert wrong_steps(recorded, config) == [], name
            other = (
                {"schedule": "polynomial"}
                if config.schedule == "cosine"
                else {"power": config.power + 1}
            )
            for control in ({"warmup": config.warmup + 0.05}, other):
                assert wrong_steps(recorded, replace(config, **control)) != [], name

    def test_float_multipliers_multiply_here(self):
        """A float multiplies the rate here, and is the group's absolute rate in the official code."""
        quirk = case("l_optimizer").json("schedule.json")["float_multiplier_quirk"]
        lr, head, fusion = (
            quirk["config"][key] for key in ("learning_rate", "lr_mult_head", "lr_mult_cross_modal")
        )
        assert quirk["lr_by_group"] == [lr, lr, head, head, fusion, fusion]
        config = replace(
            groups_config("pretrain"), lr=lr, head_multiplier=head, fusion_multiplier=fusion
        )
        ours = {group["lr"] for group in parameter_groups(build_groups("pretrain"), config)}
        assert ours == {lr, lr * head, lr * fusion}
        assert not ours & {head, fusion}


def wrong_steps(recorded, config):
    factor = schedule(config, recorded["max_steps"])
    multipliers = {
        "base": 1.0,
        "head": config.head_multiplier,
        "cross_modal": config.fusion_multiplier,
    }
    return [
        (step, group)
        for step, rates in recorded["lr_used_at_step"].items()
        for group, rate in rates.items()
        if config.lr * multipliers[group] * factor(int(step))
        != pytest.approx(rate, rel=1e-6, abs=1e-16)
    ]
