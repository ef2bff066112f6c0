"""Runs whose weights two processes share (FSDP2), against one process and against two replicas (DDP)."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jaxtyping
import pytest
import torch
from ranks import run_on_ranks
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bridgetower.checkpoints import read_checkpoint
from bridgetower.checkpoints.tensors import read_safetensors
from bridgetower.data.config import MaskingConfig
from bridgetower.distributed import rank
from bridgetower.extras import is_installed, load_object
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import HeadsConfig
from bridgetower.model.extensions import NO_EXTENSIONS, Extensions
from bridgetower.model.layers import FeedForward
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.pretraining import PretrainingTask
from bridgetower.tasks.entries import VQA, VqaConfig
from bridgetower.tasks.run_config import OptimizerConfig, read_metrics
from bridgetower.training.data_parallel import Replicated, Sharded
from bridgetower.training.run import train
from bridgetower.training.state import newest
from helpers.checkpoints import same_weights, saved_state, state_files, state_tensors
from helpers.models import build_model, random_caption_batch, same_tensors
from helpers.sets import ANSWERS, caption_record, write_entry_set, write_set
from helpers.shapes import SHAPES_MODEL, shapes_run_config, write_tiny_checkpoint

PLAIN = SHAPES_MODEL.override(
    {"text.dropout": 0.0, "fusion.dropout": 0.0, "fusion.bridge": "scaled_add"}
)
SMOOTH = OptimizerConfig(lr=1e-2, eps=1e-2, head_multiplier=2, fusion_multiplier=3, clip_norm=0.5)
# Every word is hidden and contrast spans the step, so that any number of processes computes the same.
ALL_WORDS = MaskingConfig(probability=1.0, mask_share=1.0, random_share=0.0)
HARD = Phase(mlm=1, itm=1, itc=1, negatives="hard")
WORLD_HARD = "hard negatives of the world"
TASKS = {
    "words and contrast": PretrainingConfig(
        phases=(Phase(mlm=1, itm=0, itc=1),), masking=ALL_WORDS
    ),
    "a fused head": PretrainingConfig(phases=(Phase(mlm=0, itm=0, itc=1),)),
    "vqa": VqaConfig(),
    WORLD_HARD: PretrainingConfig(phases=(HARD,), negatives_from="world"),
}
LORA = Path(__file__).parents[2] / "examples" / "lora.py"
if is_installed("peft"):
    TASKS["LoRA"] = TASKS["words and contrast"]
ALONE = [name for name in TASKS if name != WORLD_HARD]
PARTS = ("vision", "text", "fusion")


def whole_tensor(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def trained_in_process(configs, out):
    results = {}
    for name, config in configs.items():
        gradients = []

        def record(optimizer, arguments, options, seen=gradients):
            groups = optimizer.param_groups
            named_weights = [
                pair
                for group in groups
                for pair in zip(group["names"], group["params"], strict=True)
            ]
            seen.append(
                {
                    name: whole_tensor(weight.grad)
                    for name, weight in sorted(named_weights)
                    if weight.grad is not None
                }
            )

        hook = register_optimizer_step_pre_hook(record)
        extensions = (
            load_object("extensions", f"{LORA}:LORA", Extensions)
            if name == "LoRA"
            else NO_EXTENSIONS
        )
        train_options = {
            "extensions": extensions,
            "async_checkpoints": config.parallel == "fsdp",
            "progress": False,
        }
        metrics = train(config, out / name, **train_options)
        hook.remove()
        weights = dict(read_checkpoint(out / name / "last").tensors)
        entries = read_metrics(out / name, "train")
        results[name] = SimpleNamespace(
            gradients=gradients, entries=entries, weights=weights, metrics=metrics
        )
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def sharding_configs(tiny_dataset, folder):
    checkpoint = write_tiny_checkpoint(tiny_dataset, folder / "checkpoint", PLAIN)
    questions = write_entry_set(folder / "vqa", "vqa")
    settings = {
        "optimizer": SMOOTH,
        "checkpoint_activations": PARTS,
        "micro_batch_size": 2,
        "max_steps": 2,
    }
    config = shapes_run_config(tiny_dataset, init=str(checkpoint), device="cpu", **settings)
    heads = HeadsConfig(mlm=False, itm=False, vqa=len(ANSWERS))
    fused = HeadsConfig(mlm=False, itm=False, itc="fused", itc_size=6)
    changes = {
        "words and contrast": {"contrast_over": "step", "evaluate_every": None},
        "a fused head": {
            "contrast_over": "step",
            "model": replace(PLAIN, heads=fused),
            "evaluate_every": None,
        },
        "vqa": {
            "data": replace(config.data, folders=(str(questions),)),
            "model": replace(PLAIN, heads=heads),
            "optimizer": replace(SMOOTH, rule="hf_adamw"),
            "evaluation": replace(config.evaluation, candidates=128),
            "select_by": "vqa_score",
        },
        "LoRA": {"contrast_over": "step", "evaluate_every": None},
        WORLD_HARD: {"evaluate_every": 2, "checkpoint_every": 1, "micro_batch_size": 4},
    }
    return {
        name: replace(config, task=task, **{"model": PLAIN} | changes[name])
        for name, task in TASKS.items()
    }


@pytest.fixture(scope="module")
def trained_alone(sharding_configs, folder):
    return trained_in_process({name: sharding_configs[name] for name in ALONE}, folder / "alone")


@pytest.fixture(scope="module")
def trained_sharded(sharding_configs, folder):
    sharded_configs = {
        name: replace(config, parallel="fsdp") for name, config in sharding_configs.items()
    }
    return run_on_ranks(2, trained_in_process, sharded_configs, folder / "fsdp")


def assert_same_runs(actual, expected):
    for ours, theirs in zip(actual.gradients, expected.gradients, strict=True):
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, atol=2e-6, rtol=1e-5, msg=name)
    for ours, theirs in zip(actual.entries, expected.entries, strict=True):
        timed = {"kind", "time", "seconds", "data_seconds", "pairs_per_second"}
        for name in theirs.keys() - timed:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name
    for name, weight in expected.weights.items():
        torch.testing.assert_close(actual.weights[name], weight, atol=1e-6, rtol=1e-5, msg=name)
    assert actual.metrics == pytest.approx(expected.metrics, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", [*dict.fromkeys([*ALONE, "LoRA"])])
def test_two_processes_give_what_one_gives(name, trained_alone, trained_sharded):
    if name == "LoRA":
        pytest.importorskip("peft")
    for process in trained_sharded:
        assert_same_runs(process[name], trained_alone[name])
    assert (
        max(float(gradient.abs().max()) for gradient in trained_alone[name].gradients[0].values())
        > 0.01
    )


def test_a_share_of_the_weights_gives_what_whole_weights_give(
    sharding_configs, trained_sharded, tmp_path
):
    replicated = run_on_ranks(
        2,
        trained_in_process,
        {WORLD_HARD: replace(sharding_configs[WORLD_HARD], parallel="ddp")},
        tmp_path,
    )
    for actual, expected in zip(trained_sharded, replicated, strict=True):
        assert_same_runs(actual[WORLD_HARD], expected[WORLD_HARD])
    gradients = replicated[0][WORLD_HARD].gradients[0]  # parameters of one element have some
    assert float(gradients["itc_head.temperature"].abs()) > 1e-5
    assert float(gradients["fusion.text_bridges.0.scale"].abs()) > 1e-5


def test_processes_without_an_image_to_evaluate_train_on(sharding_configs, tmp_path):
    """The passes of an evaluation, of which these have none, are not prefetched for in the step that follows."""
    splits = {
        "train": [caption_record(number) for number in range(16)],
        "validation": [caption_record(16)],
    }
    config = replace(sharding_configs[WORLD_HARD], max_steps=3, evaluate_every=1)
    config = replace(
        config, data=replace(config.data, folders=(str(write_set(tmp_path / "set", splits)),))
    )
    whole, shared = (
        run_on_ranks(
            2, trained_in_process, {"run": replace(config, parallel=parallel)}, tmp_path / parallel
        )
        for parallel in ("ddp", "fsdp")
    )
    for actual, expected in zip(shared, whole, strict=True):
        assert_same_runs(actual["run"], expected["run"])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_four_processes_give_what_one_gives(parallel, sharding_configs, trained_alone, tmp_path):
    name = "words and contrast"
    config = replace(sharding_configs[name], parallel=parallel, micro_batch_size=1)
    for process in run_on_ranks(4, trained_in_process, {name: config}, tmp_path):
        assert_same_runs(process[name], trained_alone[name])


def compiled(config, out):
    jaxtyping.config.update("jaxtyping_disable", True)
    # traces both passes, and makes no kernels
    BridgeTower.compile_layers.__defaults__ = ("aot_eager",)
    return trained_in_process({"run": config}, out)["run"]


@pytest.mark.nightly
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_compiled_layers_give_the_same(parallel, sharding_configs, trained_alone, tmp_path):
    name = "words and contrast"
    for process in run_on_ranks(
        2, compiled, replace(sharding_configs[name], parallel=parallel, compile="yes"), tmp_path
    ):
        assert_same_runs(process, trained_alone[name])


def in_half_precision(config, out):
    """The gradients of the first step, and the types of weights in layers of the image tower and outside of them."""
    inside = set()
    outside = set()

    def note(module, inputs):
        if isinstance(module, FeedForward):  # in a layer that is whole by now
            inside.update(weight.dtype for weight in module.parameters())
        if isinstance(module, BridgeTower):
            outside.update(
                weight.dtype for name, weight in module.named_parameters() if "_head." in name
            )

    hook = register_module_forward_pre_hook(note)
    gradients = trained_in_process({"run": config}, out)["run"].gradients[0]
    hook.remove()
    return gradients, inside, outside


def test_in_half_precision_layers_are_put_together_in_it(sharding_configs, tmp_path):
    """Gradients are as near to those of whole weights as half precision is to single."""
    config = replace(sharding_configs["words and contrast"], max_steps=1)
    whole, _, _ = in_half_precision(config, tmp_path / "whole")
    results = {}
    for parallel in ("ddp", "fsdp"):
        half = replace(config, parallel=parallel, precision="bf16")
        results[parallel] = run_on_ranks(2, in_half_precision, half, tmp_path / parallel)[0]
    assert results["ddp"][1] == {torch.float32}
    assert results["fsdp"][1] == {torch.bfloat16}

    def off(actual, expected):
        return (
            float(torch.cat([(actual[name] - expected[name]).flatten() for name in whole]).norm())
            / length
        )

    length = float(torch.cat([gradient.flatten() for gradient in whole.values()]).norm())
    halved, sharded = (results[name][0] for name in ("ddp", "fsdp"))
    assert {gradient.dtype for gradient in sharded.values()} == {torch.float32}
    assert 1e-4 < off(halved, whole) < 2e-2
    assert off(sharded, whole) < 2e-2
    assert off(sharded, halved) < 2e-2


def held(config, out):
    """Returns how many weights the optimiser of this process has, how many there are, and the run's metrics."""
    sizes = []

    def record(optimizer, arguments, options):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        sizes.extend(
            (getattr(tensor, "_local_tensor", tensor).numel(), hasattr(tensor, "full_tensor"))
            for tensor in weights
        )

    hook = register_optimizer_step_pre_hook(record)
    metrics = train(
        config,
        out,
        task=replace(VQA, validate=lambda _: {"vqa_score": float(rank())}),
        progress=False,
    )
    hook.remove()
    return (
        sum(size for size, _ in sizes),
        sum(size for size, sharded in sizes if not sharded),
        metrics,
    )


def test_each_process_holds_half_of_the_weights_and_the_metrics_of_the_first(
    sharding_configs, trained_alone, tmp_path
):
    config = replace(sharding_configs["vqa"], max_steps=1)
    total = sum(weight.numel() for weight in trained_alone["vqa"].weights.values())
    first, second = run_on_ranks(2, held, replace(config, parallel="fsdp"), tmp_path)
    assert first[1] == second[1] == 0
    assert first[0] + second[0] == total
    assert abs(first[0] - second[0]) < 0.1 * total
    assert first[2] == second[2] == {"vqa_score": 0.0}


def clamped_temperature(kind):
    """The temperature after a step that begins above its highest value."""
    model = build_model(PLAIN).train()
    model.itc_head.temperature.data.fill_(0.6)
    run = kind(PretrainingTask(model, TASKS["words and contrast"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run(random_caption_batch((0, 1, 2, 3), (5, 3, 4, 6), PLAIN)).total.backward()
    run.clip_gradients(None)
    optimizer.step()
    return whole_tensor(model.itc_head.temperature.detach())


def test_the_shares_of_the_temperature_are_clamped():
    expected = run_on_ranks(2, clamped_temperature, Replicated)[0]
    assert 0 < abs(expected.item() - 0.5) < 0.05, "it moved from the highest value that it may have"
    for temperature in run_on_ranks(2, clamped_temperature, Sharded):
        torch.testing.assert_close(temperature, expected, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def interval(sharding_configs):
    return replace(sharding_configs[WORLD_HARD], parallel="fsdp")


@pytest.fixture(scope="module")
def whole_run(trained_sharded, folder):
    return folder / "fsdp" / WORLD_HARD


def resume_run(config, out):
    train(config, out, resume=True, progress=False)


def back_to_the_state_before(run, out):
    shutil.copytree(run, out)
    shutil.rmtree(out / "last")
    path = newest(out)
    shutil.rmtree(path)
    return out


def test_each_process_writes_its_share(whole_run, trained_alone):
    files = state_files(whole_run)
    assert [file.name for file in files] == [
        "process-00000.safetensors",
        "process-00001.safetensors",
    ]
    first, second = (dict(read_safetensors(file)) for file in files)
    name = "fusion.text_layers.0.mlp.up.weight"
    rows = len(trained_alone["vqa"].weights[name])
    for key in (f"model.{name}", f"exp_avg.{name}"):
        assert [len(share[key]) for share in (first, second)] == [rows // 2] * 2
    assert [len(share["model.itc_head.temperature"]) for share in (first, second)] == [1, 0]


@pytest.mark.parametrize("evaluate_every", [2, 1], ids=["by a step", "by an evaluation"])
def test_continued_it_ends_with_the_same_bits(evaluate_every, interval, whole_run, tmp_path):
    out = back_to_the_state_before(whole_run, tmp_path / "run")
    run_on_ranks(2, resume_run, replace(interval, evaluate_every=evaluate_every), out)
    assert same_weights(whole_run / "last", out / "last")
    evaluated = [entry["step"] for entry in read_metrics(out, "validation")]
    assert evaluated == list(range(evaluate_every, 3, evaluate_every))


def test_one_process_and_two_continue_what_the_other_has_written(interval, whole_run, tmp_path):
    """With other micro-batches, so that the last step is another one."""
    out = back_to_the_state_before(whole_run, tmp_path / "run")
    before = saved_state(out).step
    resume_run(interval, out)
    assert saved_state(out).step == before + 1 == interval.max_steps
    saved = state_tensors(out)
    last = load_file(out / "last" / "model.safetensors")
    assert all(torch.equal(saved[f"model.{name}"], weight) for name, weight in last.items())
    whole_tensors = load_file(whole_run / "last" / "model.safetensors")
    assert (
        max(float((last[name] - weight).abs().max()) for name, weight in whole_tensors.items())
        < 0.05
    )
    shutil.rmtree(out / "last")
    run_on_ranks(2, resume_run, interval, out)  # nothing is left to do but to write what was read
    assert same_tensors(load_file(out / "last" / "model.safetensors"), last)
