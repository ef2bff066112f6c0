"""Recipes hold the published numbers; a config survives JSON and refuses what it does not know."""

import inspect
import json
import re
from dataclasses import fields, replace
from typing import Any

import pytest
import tyro

from bridgetower.model.config import HeadsConfig
from bridgetower.model.presets import BASE, LARGE, meter, meter_with_norms
from bridgetower.tasks.config import Phase, PretrainingConfig, RankingConfig
from bridgetower.training.config import OptimizerConfig, RunConfig
from bridgetower.training.recipes import FINE_TUNING, RECIPES

# Learning rate, batch, steps, epochs, warm-up, decay, head and fusion multiplier, image size, text length: the paper's
# appendix and the official scripts.
PUBLISHED = {
    "pretrain-base": (1e-5, 4096, 100_000, None, 0.1, 0.01, 5, 5, 288, 50),
    "pretrain-base-itc": (1e-5, 4096, 100_000, None, 0.1, 0.01, 5, 5, 288, 50),
    "pretrain-large": (1e-5, 4096, 100_000, None, 0.1, 0.01, 5, 5, 294, 50),
    "retrieval-flickr30k": (5e-6, 512, None, 20, 0.05, 0.01, 5, 5, 384, 40),
    "retrieval-coco": (4.5e-6, 256, None, 30, 0.1, 0.01, 5, 5, 384, 40),
    "retrieval-flickr30k-ranking": (1.1e-5, 2048, None, 20, 0.1, 0.01, 5, 5, 384, 40),
}


@pytest.mark.parametrize("name", PUBLISHED)
class TestPublished:
    def test_numbers(self, name: str) -> None:
        run = RECIPES[name]
        optimizer = run.optimizer
        assert PUBLISHED[name] == (
            optimizer.lr,
            run.batch_size,
            run.max_steps,
            run.max_epochs,
            optimizer.warmup,
            optimizer.weight_decay,
            optimizer.head_multiplier,
            optimizer.fusion_multiplier,
            run.image_size or run.model.vision.image_size,
            run.data.max_length,
        )

    def test_optimiser_is_the_official_one(self, name: str) -> None:
        optimizer = RECIPES[name].optimizer
        assert (optimizer.rule, optimizer.betas, optimizer.eps) == ("official", (0.9, 0.98), 1e-8)
        assert (optimizer.schedule, optimizer.power, optimizer.end_lr) == ("polynomial", 1.0, 0.0)

    def test_architecture(self, name: str) -> None:
        model = RECIPES[name].model
        preset = LARGE if "large" in name else BASE
        assert (model.text, model.fusion) == (preset.text, preset.fusion)
        assert model.vision == replace(preset.vision, image_size=PUBLISHED[name][8])


class TestObjectives:
    def test_pre_training(self) -> None:
        for name in ("pretrain-base", "pretrain-large"):
            (phase,) = RECIPES[name].task.phases
            assert (phase.mlm, phase.itm, phase.itc, phase.negatives) == (1, 1, 0, "random")
            masking = RECIPES[name].task.masking
            assert (masking.probability, masking.mask_share, masking.random_share) == (0.15, 0.8, 0.1)
            assert RECIPES[name].model.heads.itc is None

    def test_retrieval(self) -> None:
        for name, candidates in (("retrieval-flickr30k", 128), ("retrieval-coco", 256)):
            (phase,) = RECIPES[name].task.phases
            assert (phase.mlm, phase.itm, phase.itc, phase.negatives) == (0, 1, 1, "hard")
            assert RECIPES[name].evaluation.candidates == candidates
            assert RECIPES[name].model.heads.itc == "tower"
            assert RECIPES[name].evaluate_every > 0

    def test_ranking(self) -> None:
        run = RECIPES["retrieval-flickr30k-ranking"]
        assert run.task == RankingConfig(false_texts=15, itm=1.0)
        assert run.model.heads == HeadsConfig(mlm=False, itm=True, rank=True)

    def test_pictures_are_squashed_in_fine_tuning_only(self) -> None:
        """The official `blip` transforms of the fine-tuning scripts; pre-training crops, which is the default."""
        profiles = {name: recipe.data.profile for name, recipe in RECIPES.items()}
        squashed = {name for name, profile in profiles.items() if profile == "official-finetune"}
        assert squashed == set(FINE_TUNING)
        assert all(profile is None for name, profile in profiles.items() if name not in squashed)

    def test_views_of_training_pictures(self) -> None:
        for name in PUBLISHED:
            data = RECIPES[name].data
            views = (data.random_crop, data.flip, data.rand_augment, data.rand_magnitude, data.augmentation)
            colour = (0.5, True, "colour", 7, "none")
            assert views == (colour if name in FINE_TUNING else (None, False, "none", 0, "none")), name

    def test_what_a_source_leaves_out_is_said(self) -> None:
        for name in PUBLISHED:
            assert "init" in RECIPES[name].source

    def test_the_baseline_differs_in_the_model_only(self) -> None:
        ours, baseline = RECIPES["pretrain-nano"], RECIPES["pretrain-nano-meter"]
        assert replace(ours, recipe=baseline.recipe, model=meter(ours.model)) == baseline

    def test_the_control_between_them_differs_in_the_model_only(self) -> None:
        ours, control = RECIPES["pretrain-nano"], RECIPES["pretrain-nano-meter-norms"]
        assert replace(ours, recipe=control.recipe, model=meter_with_norms(ours.model)) == control

    def test_of_any_recipe_they_are_options(self) -> None:
        """As docs/training.md says."""
        ours = RECIPES["pretrain-base"]
        options = {
            meter: ["--model.fusion.bridge", "None", "--model.fusion.no-input-norm"],
            meter_with_norms: ["--model.fusion.bridge", "norm"],
        }
        for change, arguments in options.items():
            assert tyro.cli(RunConfig, args=arguments, default=ours) == replace(ours, model=change(ours.model))


@pytest.mark.parametrize("name", RECIPES)
class TestEveryRecipe:
    def test_survives_json(self, name: str) -> None:
        run = RECIPES[name]
        assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run

    def test_says_what_it_is(self, name: str) -> None:
        run = RECIPES[name]
        assert run.recipe == name
        assert run.source
        assert run.init is None

    def test_selects_by_a_figure_that_its_heads_give(self, name: str) -> None:
        heads = RECIPES[name].model.heads
        itc = heads.itc is not None
        possible = {"rsum": itc, "itc_rsum": itc, "two_stage_rsum": itc and heads.itm, "itm_accuracy": heads.itm}
        if isinstance(RECIPES[name].task, PretrainingConfig):
            assert possible[RECIPES[name].select_by]


class TestRunConfig:
    def test_changes_survive_json(self) -> None:
        run = replace(
            RECIPES["pretrain-nano"],
            data=replace(RECIPES["pretrain-nano"].data, folders=("a", "b"), repeats=(1, 2)),
            optimizer=OptimizerConfig(schedule="cosine", betas=(0.8, 0.9), clip_norm=1.0),
            init="somewhere",
        )
        assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run

    @pytest.mark.parametrize("path", [(), ("optimizer",), ("data",), ("task",), ("model", "text")])
    def test_unknown_keys(self, path: tuple[str, ...]) -> None:
        values = RECIPES["pretrain-base"].to_dict()
        inner: dict[str, Any] = values
        for name in path:
            inner = inner[name]
        inner["learning_rat"] = 1
        with pytest.raises(ValueError, match=r"has unknown fields \['learning_rat'\]; known: \["):
            RunConfig.from_dict(values)

    def test_unknown_key_in_a_phase(self) -> None:
        values = json.loads(json.dumps(RECIPES["pretrain-nano"].to_dict()))
        values["task"]["phases"][1]["mlmm"] = 1
        with pytest.raises(ValueError, match=r"unknown fields \['mlmm'\]"):
            RunConfig.from_dict(values)

    @pytest.mark.parametrize("kind", ["painting", None])
    def test_unknown_task(self, kind: str | None) -> None:
        values = RECIPES["pretrain-base"].to_dict()
        values["task"]["kind"] = kind
        with pytest.raises(ValueError, match=rf"run config\.task\.kind is {kind!r}; expected one of pretraining, rank"):
            RunConfig.from_dict(values)

    def test_a_figure_of_another_task(self) -> None:
        with pytest.raises(ValueError, match=r"'itm_accuracy', which the evaluation of ranking does not give; .*rsum"):
            RunConfig(max_steps=1, task=RankingConfig(), select_by="itm_accuracy")

    @pytest.mark.parametrize("lengths", [{}, {"max_steps": 5, "max_epochs": 1}])
    def test_both_or_none_of_the_lengths(self, lengths: dict[str, int]) -> None:
        with pytest.raises(ValueError, match="expected exactly one of them"):
            RunConfig(**lengths)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
            ({"micro_batch_size": 0}, "micro_batch_size is 0"),
            ({"max_steps": 0}, "max_steps is 0"),
            ({"checkpoint_every": 0}, "checkpoint_every is 0"),
            ({"log_every": 0}, "log_every is 0"),
            ({"evaluate_every": -1}, "evaluate_every is -1; expected at least 0"),
            ({"precision": "fp16"}, "precision is 'fp16'; expected one of fp32, bf16"),
            ({"select_by": "loss"}, "select_by is 'loss'; expected one of rsum"),
            ({"device": "cuda:1"}, "device is 'cuda:1'; expected one of auto, cpu"),
            ({"checkpoint_activations": ("heads",)}, "checkpoint_activations is 'heads'; expected one of vision, text"),
            ({"init": "a", "tokenizer": "b"}, "tokenizer b with init a, which has its own"),
        ],
    )
    def test_values(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            RunConfig(**({"max_steps": 5} | values))

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"lr": 0.0}, r"lr 0\.0, .*expected lr > 0"),
            ({"weight_decay": -0.1}, "weight_decay -0.1"),
            ({"warmup": 1.0}, "warm-up as a share"),
            ({"head_multiplier": -1.0}, "expected multipliers >= 0"),
            ({"clip_norm": 0.0}, "clip_norm 0.0; expected multipliers >= 0 and a norm above 0"),
            ({"rule": "offical"}, "rule is 'offical'; expected one of plain, official"),
            ({"schedule": "linear"}, "schedule is 'linear'; expected one of polynomial, cosine"),
            ({"schedule": "cosine", "power": 2.0}, "are for the polynomial schedule"),
            ({"schedule": "cosine", "end_lr": 1e-7}, "are for the polynomial schedule"),
        ],
    )
    def test_optimizer_values(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            OptimizerConfig(**values)

    @pytest.mark.parametrize("name", ["recipe", "source"])
    def test_where_a_run_comes_from_is_no_option(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        options = ["--seed", "3"]
        assert tyro.cli(RunConfig, args=options, default=RECIPES["pretrain-nano"]).seed == 3
        with pytest.raises(SystemExit):
            tyro.cli(RunConfig, args=[*options, f"--{name}", "mine"], default=RECIPES["pretrain-nano"])
        assert f"--{name}" in capsys.readouterr().err

    @pytest.mark.parametrize("config", [RunConfig, OptimizerConfig, PretrainingConfig, RankingConfig, Phase])
    def test_every_field_has_an_entry_of_its_own(self, config: type[Any]) -> None:
        """The command's help shows an entry only for the one name before its colon."""
        entries = re.findall(r"^        (\w+): ", inspect.getdoc(config).replace("\n    ", "\n        "), re.MULTILINE)
        assert entries == [item.name for item in fields(config)]

    def test_every_part_can_be_changed_by_its_name(self) -> None:
        """What `run.json` names is what the command's options name."""
        assert set(RECIPES["pretrain-base"].to_dict()) == {item.name for item in fields(RunConfig)}
