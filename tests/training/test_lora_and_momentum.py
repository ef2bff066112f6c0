"""The examples of LoRA, momentum distillation and rates by layer: what trains, what is kept of it, losses by hand."""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bridgetower
from bridgetower import BridgeTower
from bridgetower.checkpoints import read_checkpoint
from bridgetower.extras import load_object
from bridgetower.model.extensions import Extensions
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.tasks.run_config import OptimizerConfig
from bridgetower.tasks.table import evaluate
from bridgetower.training.run import train
from bridgetower.training.setup import Callback
from helpers.checkpoints import same_weights, state_tensors
from helpers.models import (
    SMALL_CONFIG,
    max_difference,
    off_defaults,
    random_caption_batch,
    random_images,
    random_texts,
    same_tensors,
)
from helpers.shapes import SHAPES_PHASES, shapes_run_config

pytest.importorskip("peft")
EXAMPLES = Path(__file__).parents[2] / "examples"
LORA, MOMENTUM, LAYERED = (
    load_object("extensions", f"{EXAMPLES / name}.py:{name.upper()}", Extensions)
    for name in ("lora", "momentum", "layered")
)
DISTILLED = Phase(mlm=0, itm=0, objectives={"momentum_itc": 1, "momentum_mlm": 1})


class Stop(Callback):
    def after_step(self, context, optimizer, step):
        if step == 3:
            raise KeyboardInterrupt


@pytest.fixture
def config(tiny_dataset, tiny_checkpoint):
    changes = {
        "init": str(tiny_checkpoint),
        "checkpoint_every": 2,
        "evaluate_every": 2,
        "max_steps": 4,
    }
    return shapes_run_config(tiny_dataset, **changes)


@pytest.mark.parametrize(
    ("extensions", "phase"), [(LORA, SHAPES_PHASES[-1]), (MOMENTUM, replace(DISTILLED, itm=1))]
)
def test_a_killed_run_goes_on_with_the_same_bits(config, tmp_path, extensions, phase):
    config = replace(config, task=PretrainingConfig(phases=(phase,)))
    metrics = train(config, tmp_path / "whole", extensions=extensions, progress=False)
    stopped = replace(extensions, callbacks=(*extensions.callbacks, Stop()))
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", extensions=stopped, progress=False)
    assert (
        train(config, tmp_path / "parts", extensions=extensions, resume=True, progress=False)
        == metrics
    )
    assert same_tensors(state_tensors(tmp_path / "parts"), state_tensors(tmp_path / "whole"))
    for folder in ("last", "best"):
        assert same_weights(tmp_path / "parts" / folder, tmp_path / "whole" / folder)


def test_lora_trains_matrices_and_heads_and_is_merged(config, tmp_path, tiny_dataset, caplog):
    out = tmp_path / "run"
    start = read_checkpoint(config.init)
    with caplog.at_level(logging.INFO):
        metrics = train(config, out, extensions=LORA, progress=False)
    saved = {
        name.removeprefix("model."): tensor
        for name, tensor in state_tensors(out).items()
        if "model." in name
    }
    before = {
        name: start.tensors.get(name.replace(".base_layer", ""), torch.zeros(0)) for name in saved
    }
    moved = {name for name in saved if not torch.equal(saved[name], before[name])}
    assert all(".lora_" in name or "_head." in name for name in moved)
    assert {
        "fusion.text_layers.1.cross_attention.query.lora_B.default.weight",
        "itm_head.fc.weight",
    } <= moved
    trained = sum(saved[name].numel() for name in saved if ".lora_" in name or "_head." in name)
    assert (
        f"training {trained:,} of {sum(map(torch.numel, saved.values())):,} weights: step 1 to 4"
        in caplog.text
    )

    adapted = LORA.callbacks[0].model.base_model.model.eval()
    merged = read_checkpoint(out / "last").model()
    changed = {
        name
        for name, tensor in merged.state_dict().items()
        if not torch.equal(tensor, start.tensors[name])
    }
    assert {"vision.layers.0.mlp.down.weight", "text.layers.1.attention.qkv.weight"} <= changed
    inputs = random_images(3, merged.config), *random_texts((5, 3, 4), merged.config)
    with torch.no_grad():
        outputs = [model(*inputs).pooled for model in (merged, adapted, start.model())]
    assert (
        max_difference(outputs[0], outputs[1])
        < 1e-5
        < 1e-3
        < max_difference(outputs[0], outputs[2])
    )
    loaded = bridgetower.load(out / "last", device="cpu")
    outcome = evaluate(loaded, "retrieval", [tiny_dataset], "validation", config.evaluation)
    assert outcome.metrics["itc_rsum"] == pytest.approx(metrics["itc_rsum"])


def test_rates_rise_by_layer():
    prefixes = (
        "vision.patch_embedding",
        "vision.layers.0",
        "text.layers.11",
        "text.word_embedding",
        "fusion.layers.2",
    )
    names = [f"{prefix}.weight" for prefix in prefixes]
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(1)) for _ in names], "names": names, "lr": 2.0}
    ]
    optimizer = LAYERED.optimizers["by_layer"](groups, OptimizerConfig())
    rates = [(group["names"], group["lr"]) for group in optimizer.param_groups]
    depths = [11, 11, 0, 11, 0]
    assert rates == [
        ([name], pytest.approx(2 * 0.8**depth)) for name, depth in zip(names, depths, strict=True)
    ]


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (0.05, 0.2), (1.0, 0.4)])
def test_momentum_gives_part_of_the_plain_loss_to_soft_targets_of_a_copy_that_follows(
    progress, share
):
    module = sys.modules[f"{EXAMPLES}/momentum.py"]
    batch = random_caption_batch((0, 1, 2, 2), [7, 4, 6, 5], seed=3)
    momentum = module.Momentum(alpha=0.4, momentum=0.9, ramp=0.1)
    model = off_defaults(BridgeTower(SMALL_CONFIG, module.extensions(momentum))).eval()
    momentum.prepare(SimpleNamespace(model=model))
    off_defaults(model.teacher, seed=1)
    task = PretrainingTask(model, PretrainingConfig(phases=(DISTILLED,)))
    task.progress = progress

    def outputs(of):
        image = of.encode_image(batch.pixel_values)
        text = of.encode_text(batch.input_ids, batch.attention_mask)
        masked = of.encode_text(batch.masked_input_ids, batch.attention_mask)
        words = of.mlm_logits(of.fuse(image, masked, "text").text[:, 1])
        return of.image_embeds(image) @ of.text_embeds(text).T / model.itc_head.temperature, words

    def cross(soft, logits):
        return -(soft.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1).mean()

    (logits, words) = outputs(model)
    (soft, soft_words) = outputs(model.teacher)
    soft = {
        "itc": (cross(soft, logits) + cross(soft.T, logits.T)) / 2,
        "mlm": cross(soft_words, words),
    }
    plain = PretrainingTask(model, PretrainingConfig(phases=(Phase(mlm=1, itm=0, itc=1),)))(batch)
    losses = task(batch)
    for name in soft:
        expected = (1 - share) * plain.terms[name] + share * soft[name]
        torch.testing.assert_close(losses.terms[f"momentum_{name}"], expected)
    assert losses.metrics["mlm_accuracy"] == plain.metrics["mlm_accuracy"]

    copied, weight = (
        network.fusion.text_layers[0].mlp.up.weight for network in (model.teacher, model)
    )
    expected = 0.9 * copied + 0.1 * weight
    momentum.after_step(SimpleNamespace(model=model), None, 1)
    torch.testing.assert_close(copied, expected)
