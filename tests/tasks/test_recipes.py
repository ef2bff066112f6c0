"""Recipes hold the published numbers: the table of the paper's appendix and the official scripts, row by row.

All fields are in `tests/contracts/recipes.json`.
"""

import json
from dataclasses import fields, replace

import pytest
import tyro

from bridgetower.model.heads import HEADS as HEAD_SPECS
from bridgetower.model.presets import meter, meter_with_norms
from bridgetower.objectives.config import PretrainingConfig, RankingConfig
from bridgetower.tasks.run_config import RunConfig
from bridgetower.tasks.table import RECIPES, TASKS

# How training pictures are varied: smallest crop, mirrored, RandAugment and its magnitude, profile of evaluation.
PLAIN = (None, False, "none", 0, None)
COLOUR = (0.5, True, "colour", 7, "official-finetune")
QUESTIONS = (0.5, False, "geometry", 5, "official-finetune")
CLIP = (None, False, "colour", 9, "official-pretrain")


# Rows of the table: rate, batch, steps, epochs, warm-up, decay, multipliers of heads and fusion, image, length,
# how training pictures are varied, and the scale of hidden layers in heads, where it matters.
PUBLISHED = {
    "pretrain-base": (1e-5, 4096, 100_000, None, 0.1, 0.01, 5, 5, 288, 50, PLAIN, None),
    "pretrain-base-itc": (1e-5, 4096, 100_000, None, 0.1, 0.01, 5, 5, 288, 50, PLAIN, None),
    "pretrain-large": (1e-5, 4096, 100_000, None, 0.1, 0.01, 5, 5, 294, 50, PLAIN, None),
    "vqav2-base": (1e-5, 512, None, 10, 0.06, 0.05, 50, 5, 576, 50, QUESTIONS, 2),
    "vqav2-large": (4e-6, 512, None, 10, 0.06, 0.05, 50, 5, 574, 50, QUESTIONS, 2),
    "vqav2-base-no-pretraining": (2e-5, 512, None, 10, 0.1, 0.01, 50, 5, 576, 50, CLIP, 1),
    "vqav2-large-no-pretraining": (1e-5, 512, None, 10, 0.1, 0.01, 50, 5, 574, 50, CLIP, 1),
    "snli-ve": (3e-6, 64, None, 5, 0.06, 0.01, 10, 5, 384, 50, COLOUR, 2),
    "nlvr2": (5e-6, 64, None, 10, 0.1, 0.008, 10, 5, 384, 50, COLOUR, 1.5),
    "retrieval-flickr30k": (5e-6, 512, None, 20, 0.05, 0.01, 5, 5, 384, 40, COLOUR, None),
    "retrieval-coco": (4.5e-6, 256, None, 30, 0.1, 0.01, 5, 5, 384, 40, COLOUR, None),
    "retrieval-flickr30k-ranking": (1.1e-5, 2048, None, 20, 0.1, 0.01, 5, 5, 384, 40, COLOUR, None),
}

# `per_gpu_batchsize` of the official scripts, on 8 GPUs, where the objective depends on it: what the official MLM is a
# mean over, what ITC compares in each process, and what hard negatives and those of matching are drawn from.
PER_GPU = {"retrieval-flickr30k": 8, "retrieval-coco": 16, "retrieval-flickr30k-ranking": 4}
PER_GPU |= {"pretrain-base": 32, "pretrain-base-itc": 32, "pretrain-large": 16}


@pytest.mark.parametrize("name", PUBLISHED)
class TestPublished:
    def test_row(self, name):
        run = RECIPES[name]
        optimizer = run.optimizer
        data = run.data
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
            data.max_length,
            (data.random_crop, data.flip, data.rand_augment, data.rand_magnitude, data.profile),
            run.model.heads.hidden_scale if PUBLISHED[name][-1] else None,
        )

    def test_batch_splits_into_micro_batches_on_one_or_eight_processes(self, name):
        run = RECIPES[name]
        for processes in (1, 8):
            share = run.batch_size // processes
            assert share % min(run.micro_batch_size or share, share) == 0
        if isinstance(run.task, PretrainingConfig | RankingConfig):
            assert run.micro_batch_size == PER_GPU[name]

    def test_needs_what_its_source_says(self, name):
        run = RECIPES[name]
        assert "init" in run.source or "give vision and text" in run.source
        fine_tuning = {recipe.recipe for spec in TASKS.values() for recipe in spec.fine_tuning}
        assert (name in fine_tuning) == (not name.startswith("pretrain"))
        # whose evaluation takes long
        assert run.evaluate_every or name == "retrieval-flickr30k-ranking"


class TestObjectives:
    def test_mlm_is_normalised_as_published_and_in_our_recipes_over_the_step(self):
        rules = {
            name: recipe.task.mlm_normalization
            for name, recipe in RECIPES.items()
            if isinstance(recipe.task, PretrainingConfig)
            and any(phase.mlm for phase in recipe.task.phases)
        }
        ours = {name for name, rule in rules.items() if rule == "step"}
        assert ours == {"pretrain-nano", "pretrain-nano-meter", "pretrain-nano-meter-norms"}
        assert rules.keys() - ours == {"pretrain-base", "pretrain-base-itc", "pretrain-large"}
        for name, rule in rules.items():
            assert ("over each micro-batch" in RECIPES[name].source) == (rule == "official")

    def test_contrastive_fine_tuning_is_that_of_transformers_trainer(self):
        run = RECIPES["contrastive-large"]
        assert run.batch_size == 8 * run.micro_batch_size
        optimizer = run.optimizer
        schedule = (optimizer.schedule, optimizer.power, optimizer.end_lr)
        assert schedule == ("polynomial", 1, 0)
        theirs = {
            field.name: field.default
            for field in fields(pytest.importorskip("transformers").TrainingArguments)
        }
        assert theirs["lr_scheduler_type"] == "linear"
        assert optimizer.betas == (theirs["adam_beta1"], theirs["adam_beta2"])
        assert (optimizer.eps, optimizer.weight_decay) == (
            theirs["adam_epsilon"],
            theirs["weight_decay"],
        )
        assert (optimizer.clip_norm, optimizer.warmup) == (
            theirs["max_grad_norm"],
            theirs["warmup_steps"],
        )

    @pytest.mark.parametrize(
        ("suffix", "change"), [("meter", meter), ("meter-norms", meter_with_norms)]
    )
    def test_the_baseline_and_the_control_differ_in_the_model_only(self, suffix, change):
        ours = RECIPES["pretrain-nano"]
        other = RECIPES[f"pretrain-nano-{suffix}"]
        assert replace(ours, recipe=other.recipe, model=change(ours.model)) == other

    def test_of_any_recipe_they_are_options(self):
        """As docs/training.md says."""
        ours = RECIPES["pretrain-base"]
        bridge = "--model.fusion.bridge"
        options = {
            meter: [bridge, "None", "--model.fusion.no-input-norm"],
            meter_with_norms: [bridge, "norm"],
        }
        for change, arguments in options.items():
            assert tyro.cli(RunConfig, args=arguments, default=ours) == replace(
                ours, model=change(ours.model)
            )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_is_and_selects_by_a_metric_that_its_heads_give(name):
    run = RECIPES[name]
    heads = RECIPES[name].model.heads
    assert (
        RunConfig.from_dict(json.loads(json.dumps(run.to_dict())), {run.task.kind: type(run.task)})
        == run
    )
    assert (run.recipe, run.init) == (name, None)
    assert run.source
    itc = heads.itc is not None
    possible = {"rsum": itc, "itc_rsum": itc, "itm_accuracy": heads.itm}
    possible |= dict.fromkeys(("matching_rsum", "two_stage_rsum"), itc and heads.itm)
    assert run.select_by in run.task.metrics
    assert not isinstance(run.task, PretrainingConfig) or possible[run.select_by]


@pytest.mark.parametrize("head", HEAD_SPECS)
def test_the_recipe_that_the_error_of_a_missing_head_names_trains_it(head):
    assert getattr(RECIPES[str(HEAD_SPECS[head].recipe)].model.heads, head)
