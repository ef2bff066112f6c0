"""What only a GPU shows: its numbers beside those of the CPU, waiting, memory and several GPUs. Skipped without one."""

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bridgetower.inference.predictor import load
from bridgetower.model.layers import autocast
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.tasks.run_config import OptimizerConfig, RunConfig, read_metrics
from bridgetower.training.data_parallel import Replicated, set_numerics
from bridgetower.training.optim import build_optimizer, parameter_groups
from bridgetower.training.run import train
from bridgetower.training.setup import TrainContext
from bridgetower.training.step import run_step
from helpers.checkpoints import same_weights
from helpers.models import build_model, changed_config, random_caption_batch
from helpers.servers import PNGS
from helpers.shapes import shapes_run_config, shapes_train_command

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

PLAIN = changed_config(text__dropout=0.0, fusion__dropout=0.0)
TASK = PretrainingConfig(phases=(Phase(mlm=1, itm=1, itc=1, negatives="hard"),))
TOLERANCES = {"fp32": 1e-5, "bf16": 3e-2}


def passed(device: str, precision: str) -> tuple[dict[str, Tensor], Tensor]:
    """Losses and all gradients of a batch."""
    where = torch.device(device)
    set_numerics(where, precision, deterministic=False)
    task = PretrainingTask(build_model(PLAIN).to(where), TASK)
    with autocast(where, precision):
        losses = task(random_caption_batch((0, 1, 2, 3), (5, 3, 7, 4), PLAIN, seed=1).to(where))
    losses.total.backward()
    gradients = torch.cat(
        [weight.grad.flatten() for weight in task.parameters() if weight.grad is not None]
    )
    return {name: loss.detach().cpu() for name, loss in losses.terms.items()}, gradients.cpu()


@pytest.mark.parametrize("precision", TOLERANCES)
def test_losses_and_gradients_are_those_of_the_cpu(precision):
    actual = passed("cuda", precision)
    expected = passed("cpu", "fp32")
    for name, loss in expected[0].items():
        torch.testing.assert_close(actual[0][name], loss, atol=0.0, rtol=TOLERANCES[precision])
    distance = float((actual[1] - expected[1]).norm() / expected[1].norm())
    assert distance < 10 * TOLERANCES[precision]
    assert precision == "fp32" or distance > 1e-5


def test_a_step_does_not_wait_for_the_gpu():
    optimizer = OptimizerConfig(rule="hf_adamw", clip_norm=1.0)
    settings = {"batch_size": 4, "max_steps": 10, "precision": "bf16", "select_by": "itc_rsum"}
    config = RunConfig(task=TASK, model=PLAIN, optimizer=optimizer, **settings)
    model = build_model(PLAIN).to("cuda").train()
    task: nn.Module = PretrainingTask(model, TASK)
    context = TrainContext(config=config, task=task, model=model, examples=[])  # type: ignore[arg-type]
    optimizer = build_optimizer(parameter_groups(model, config.optimizer), config.optimizer)
    wrapped = Replicated(task)
    batches = [
        random_caption_batch((0, 1, 2, 3), (5, 3, 7, 4), PLAIN, seed=seed).pin_memory()
        for seed in range(3)
    ]
    run_step(wrapped, context, optimizer, iter(batches), 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_step(wrapped, context, optimizer, iter(batches[1:]), 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_deterministic_runs_end_with_the_same_bits(tiny_dataset, tmp_path):
    config = shapes_run_config(tiny_dataset, deterministic=True)
    for name in ("one", "other"):
        train(config, tmp_path / name, progress=False)
    assert same_weights(tmp_path / "one" / "last", tmp_path / "other" / "last")


def test_a_batch_that_does_not_fit_is_named(tiny_dataset, tmp_path):
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        config = replace(shapes_run_config(tiny_dataset), batch_size=24)
        with pytest.raises(ValueError, match="does not fit into memory"):
            train(
                replace(config, model=config.model.override({"vision.hidden_size": 512})),
                tmp_path,
                progress=False,
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_gpus_train(tiny_dataset, tmp_path, parallel):
    options = ("--max-steps", "4", "--parallel", parallel)
    command: list[Any] = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command += [
        "-m",
        "bridgetower",
        *shapes_train_command(tiny_dataset, tmp_path / "run", *options),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(tmp_path / "run", "train")) == 4


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.06), ("fp16", 0.01)]
)
def test_a_predictor_gives_what_it_gives_on_the_cpu(tiny_checkpoint, precision, tolerance):
    images = list(PNGS[:3])
    texts = ["a red bar", "a circle", "a blue square on grey"]
    results = []
    fingerprints = set()
    for options in ({"device": "cpu"}, {"device": "cuda", "precision": precision}):
        model = load(tiny_checkpoint, **options)
        results.append(
            [model.embed_images(images), model.embed_texts(texts), model.match(images, texts)]
        )
        fingerprints.add(model.fingerprint)
    assert len(fingerprints) == 1
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)
