"""Runs in bfloat16 against the same in float32: autocast covers the forward pass and casts nothing else."""

from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fitting import recorded_gradients
from torch import Tensor

import bridgetower.training.run as run_module
from bridgetower.checkpoints import read_checkpoint
from bridgetower.data.sets.custom import prepare_custom
from bridgetower.objectives.config import PretrainingConfig
from bridgetower.objectives.losses import info_nce
from bridgetower.tasks.run_config import read_metrics
from bridgetower.tasks.table import RECIPES
from bridgetower.training.run import train
from helpers.sets import ANSWERS, ENTRY_KINDS, NUM_CLASSES, write_entry_set, write_labelled_table
from helpers.shapes import SHAPES_MODEL

# Of recipes with the same task and the same kind of contrastive head one.
DISTINCT = {
    (recipe.task, recipe.model.heads.itc): name for name, recipe in reversed(RECIPES.items())
}
CONTRASTING = [
    name
    for (task, _), name in DISTINCT.items()
    if isinstance(task, PretrainingConfig) and any(phase.itc for phase in task.phases)
]
# By recipe the head, and the loss of all its outputs and labels of a step.
LOGITS = {
    "vqav2-base": ("vqa_head", lambda x, y: F.binary_cross_entropy_with_logits(x, y) * y.shape[1]),
    "snli-ve": ("snli_ve_head", F.cross_entropy),
    "classification": ("classification_head", F.cross_entropy),
    "regression": ("classification_head", lambda logits, labels: F.mse_loss(logits[:, 0], labels)),
    "nlvr2": ("nlvr2_head", F.cross_entropy),
}

FEATURES = ("image_pooling", "text_pooling", "itc_dropout")
"""What heads read, which stays that of the small model."""


@pytest.fixture(scope="module")
def run_folders(tmp_path_factory, tiny_dataset):
    folder = tmp_path_factory.mktemp("sets")
    table = write_labelled_table(folder / "things", multi_label=False)
    prepare_custom("classification", table, folder / "classification", progress=False)
    ratings = folder / "ratings.csv"
    ratings.write_text(
        "text,label\n" + "".join(f"a thing of {number % 7},{number / 10}\n" for number in range(40))
    )
    prepare_custom("regression", ratings, folder / "regression", progress=False)
    return {
        **{name: folder / name for name in ("classification", "regression")},
        **{kind: write_entry_set(folder / kind, kind) for kind in ENTRY_KINDS},
        **dict.fromkeys(("pretraining", "ranking"), tiny_dataset),
    }


@pytest.fixture(scope="module")
def cut_down(run_folders, tiny_checkpoint):
    """Makes one step of a small model out of a recipe, whose task, views, kinds of heads and optimiser stay."""

    def cut(name, **changes):
        recipe = RECIPES[name]
        head_settings = {name: getattr(SHAPES_MODEL.heads, name) for name in FEATURES}
        task = recipe.task
        heads = replace(recipe.model.heads, itc_size=8, **head_settings)
        if heads.vqa:
            heads = replace(heads, vqa=len(ANSWERS))
        if heads.classification > 1:
            heads = replace(heads, classification=NUM_CLASSES)
        fusion = replace(SHAPES_MODEL.fusion, num_token_types=recipe.model.fusion.num_token_types)
        folder = run_folders[task.kind]
        config = replace(
            recipe,
            model=replace(SHAPES_MODEL, heads=heads, fusion=fusion),
            init=str(tiny_checkpoint),
            image_size=None,
            data=replace(recipe.data, folders=(str(folder),), max_length=24, num_workers=0),
            batch_size=8,
            micro_batch_size=4,
            max_steps=1,
            align_first=0,
            max_epochs=None,
            log_every=1,
        )
        config = replace(config, **changes)
        validates = name in LOGITS and config.precision == "bf16"
        return replace(config, evaluate_every=0 if validates else None)

    return cut


@pytest.fixture(scope="module")
def watch(cut_down, tmp_path_factory):
    @cache
    def watched(name, **changes):
        seen = SimpleNamespace(batches=[], outputs={}, validated={})
        original = run_module.build_task
        out = tmp_path_factory.mktemp("run") / "run"

        def keep(name):
            def hook(module, inputs, output):
                outputs = seen.outputs if module.training else seen.validated
                outputs.setdefault(name, []).append(output.detach())

            return hook

        def build_task(*arguments):
            work = original(*arguments)
            work.task.register_forward_pre_hook(lambda task, inputs: seen.batches.append(inputs[0]))
            for name, module in work.task.named_modules():
                if "_head" in name:
                    module.register_forward_hook(keep(name.removeprefix("model.")))
            assert {parameter.dtype for parameter in work.task.parameters()} == {torch.float32}
            seen.gradients = stack.enter_context(recorded_gradients(work.task))
            return work

        with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
            patch.setattr(run_module, "build_task", build_task)
            train(cut_down(name, **changes), out, progress=False)
        (seen.losses,) = read_metrics(out, "train")
        return seen

    return watched


@pytest.mark.parametrize("name", DISTINCT.values())
def test_of_every_task_batches_are_those_of_float32_and_losses_and_gradients_close(name, watch):
    half, full = (watch(name, precision=precision) for precision in ("bf16", "fp32"))
    assert len(half.batches) == len(full.batches) == 2
    for half_batch, full_batch in zip(half.batches, full.batches, strict=True):
        for field_name, value in vars(full_batch).items():
            half_value = getattr(half_batch, field_name)
            if isinstance(value, Tensor):
                assert half_value.dtype == value.dtype, field_name
                assert torch.equal(half_value, value), field_name
    assert_gradient_close(half, full)


def assert_gradient_close(half, full):
    """Losses differ by at most 1 % and gradients by 10 % of their length, but they differ."""
    names = ("itc", "itm", "mlm", "rank", "vqa", "snli_ve", "nlvr2", "image", "text", "loss")
    losses = [[seen.losses[name] for name in names if name in seen.losses] for seen in (half, full)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0] != losses[1]
    (gradient,) = half.gradients
    (other,) = full.gradients
    assert 0 < float((gradient - other).norm()) < 0.1 * float(other.norm())


@pytest.mark.parametrize("name", LOGITS)
def test_losses_are_those_of_the_logits_in_float32(name, watch):
    head, loss = LOGITS[name]
    seen = watch(name, precision="bf16")
    assert {logits.dtype for logits in seen.outputs[head]} == {torch.bfloat16}
    assert {logits.dtype for logits in seen.validated[head]} == {torch.float32}
    targets = torch.cat([batch.labels for batch in seen.batches])
    # they could be rounded
    assert not targets.is_floating_point() or not targets.equal(targets.bfloat16().float())
    expected = loss(torch.cat(seen.outputs[head]).float(), targets)
    assert seen.losses["loss"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", CONTRASTING)
def test_contrast_over_a_step_is_that_of_the_features_in_float32(name, watch, tiny_checkpoint):
    seen, full = (
        watch(name, contrast_over="step", precision=precision) for precision in ("bf16", "fp32")
    )
    fused = RECIPES[name].model.heads.itc == "fused"  # which starts anew here
    sides = ("image", "text", "pooled") if fused else ("image", "text")
    features_by_side = [seen.outputs[f"itc_head.{side}"][:2] for side in sides]  # of the first pass
    assert {features.dtype for side_features in features_by_side for features in side_features} == {
        torch.bfloat16
    }
    embeds = [
        F.normalize(torch.cat(side_features).float(), dim=-1) for side_features in features_by_side
    ]
    index = torch.cat([batch.image_index for batch in seen.batches])
    temperature = read_checkpoint(tiny_checkpoint).tensors["itc_head.temperature"]
    scale = 1 / (torch.tensor(0.07) if fused else temperature)
    expected = info_nce(embeds, index, embeds, index, logit_scale=scale)
    assert seen.losses["itc"] == pytest.approx(expected.item(), rel=1e-6)
    assert seen.losses["itc"] != torch.tensor(seen.losses["itc"]).bfloat16().item()
    assert_gradient_close(seen, full)
