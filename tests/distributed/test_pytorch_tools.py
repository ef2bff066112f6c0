"""The bare module in the tools of PyTorch and of peft: the same outputs and gradients as without them."""

import copy
import pickle
from dataclasses import replace
from io import BytesIO

import pytest
import torch
from ranks import run_on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.export import Dim
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from bridgetower.checkpoints import read_checkpoint, save
from bridgetower.distributed import rank, world_size
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import HeadsConfig
from bridgetower.model.cpu import optimize_for_cpu
from bridgetower.model.fusion import Fused
from helpers.models import (
    build_model,
    changed_config,
    max_difference,
    random_encodings,
    random_images,
    random_texts,
)

CONFIG = changed_config(
    text__dropout=0.0, fusion__dropout=0.0, fusion__bridge="scaled_add", heads__itc="fused"
)
WITHOUT_HEADS = replace(CONFIG, heads=HeadsConfig(mlm=False, itm=False))
OFFICIAL = CONFIG.override({"fusion.bridge": "interpolate", "heads.itc": "tower"})
MANAGED = CONFIG.override({"fusion.bridge": "static_manager"})
ATOL = 1e-5


def model_inputs(lengths=(5, 7, 3, 4), width=7):
    return random_images(len(lengths)), *random_texts(lengths, width=width)


def loss_of_outputs(model, fused):
    squares = [output.square().flatten(1).mean(dim=1) for output in fused]
    return torch.stack(squares).sum(dim=0).mean()


def loss_of_heads(model, fused):
    """Reads parameters after the forward pass too, scalars among them."""
    logits = model.itm_logits(fused.pooled)
    scaled = 0.01 * model.head("itc").logit_scale() * model.pair_embeds(fused.pooled)[:, 0]
    return loss_of_outputs(model, fused) + logits.square().mean() + scaled.mean()


def unwrapped(model):
    return model


def replicated(model):
    return DistributedDataParallel(model)


def replicated_in_part(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


def fully_sharded(model):
    return fully_shard(model)


def sharded_by_layer(model):
    for layer in model.layers():
        fully_shard(layer)
    return fully_shard(model)


def second_gradients(config, wrap, loss_of):
    """Returns the gradients of the second of two steps on this process's share of the pairs."""
    model = build_model(config).eval()  # managers draw noise in training
    run = wrap(model)
    share = [tensor.chunk(world_size())[rank()] for tensor in model_inputs()]
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        loss_of(model, run(*share)).backward()
    gradients = {
        name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None
    }
    return {
        name: getattr(gradient, "full_tensor", gradient.clone)()
        for name, gradient in gradients.items()
    }


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(
    ("wrap", "config", "loss_of"),
    [
        (replicated, WITHOUT_HEADS, loss_of_outputs),
        (replicated_in_part, WITHOUT_HEADS, loss_of_outputs),
        (replicated_in_part, CONFIG, loss_of_outputs),
        (fully_sharded, CONFIG, loss_of_heads),
        (fully_sharded, OFFICIAL, loss_of_outputs),
        (fully_sharded, MANAGED, loss_of_heads),
        (sharded_by_layer, CONFIG, loss_of_heads),
    ],
)
def test_processes_have_the_gradients_of_one(wrap, config, loss_of, processes):
    expected = second_gradients(config, unwrapped, loss_of)
    for actual in run_on_ranks(processes, second_gradients, config, wrap, loss_of):
        assert {name for name, gradient in actual.items() if gradient.any()} == expected.keys()
        assert (
            max(max_difference(actual[name], gradient) for name, gradient in expected.items())
            < ATOL
        )
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 0.01


@pytest.fixture
def float_model():
    return build_model(CONFIG)


@torch.no_grad()
def assert_same_outputs(run, model, *batch):
    """Compares all outputs of a form of the model with those of the model itself."""
    actual = run(*batch)
    for name, expected in model(*batch)._asdict().items():
        assert max_difference(getattr(actual, name), expected) < ATOL, name


def gradients_of_run(run, model):
    return torch.autograd.grad(
        loss_of_outputs(model, run(*model_inputs())),
        list(model.parameters()),
        allow_unused=True,
    )


SIZES = {"pixel_values": {0: Dim("batch", max=64)}} | {
    name: {0: Dim("batch", max=64), 1: Dim("length", max=14)}
    for name in ("input_ids", "attention_mask")
}


def exported_program(model, strict):
    return torch.export.export(model, model_inputs(), dynamic_shapes=SIZES, strict=strict).module()


def assert_export(strict):
    model = build_model(CONFIG)
    run = exported_program(model, strict)
    for batch in (model_inputs(), model_inputs((9, 2), width=9)):
        assert isinstance(run(*batch), Fused)
        assert_same_outputs(run, model, *batch)


def assert_compiles(backend):
    model = build_model(CONFIG)
    run = torch.compile(model, backend=backend, fullgraph=True)
    for batch in (model_inputs(), model_inputs((9, 2), width=9)):
        assert_same_outputs(run, model, *batch)
    for actual, expected in zip(
        gradients_of_run(run, model), gradients_of_run(model, model), strict=True
    ):
        assert (actual is None) == (expected is None)
        assert expected is None or max_difference(actual, expected) < ATOL


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    # as the compiler cannot read the checks of shapes in this process
    run_on_ranks(1, assert_export, strict)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend):
    run_on_ranks(1, assert_compiles, backend)


@pytest.mark.filterwarnings("ignore:torch.(ao.)?quant")  # which PyTorch leaves to torchao
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_dynamic_quantisation(float_model, dtype):
    small = torch.ao.quantization.quantize_dynamic(float_model, {nn.Linear}, dtype=dtype)
    assert not any(type(module) is nn.Linear for module in small.modules())
    expected = float_model(*model_inputs())
    outputs = small(*model_inputs())
    tolerance = 0.1 if dtype == torch.qint8 else 0.01
    for name, output in expected._asdict().items():
        difference = max_difference(getattr(outputs, name), output) / float(
            output.detach().abs().max()
        )
        assert 1e-6 < difference < tolerance, name
    assert (
        max_difference(small.itm_logits(outputs.pooled), float_model.itm_logits(expected.pooled))
        < 0.2
    )


def without_memory(model):
    with torch.device("meta"):
        return BridgeTower(model.config).eval()


def emptied(model):
    made = without_memory(model).to_empty(device="cpu")
    made.load_state_dict(model.state_dict())
    return made


def assigned(model):
    made = without_memory(model)
    made.load_state_dict(model.state_dict(), assign=True)
    return made


def saved_whole(model):
    file = BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def saved_weights(model):
    file = BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    made = build_model(CONFIG, seed=1)
    made.load_state_dict(torch.load(file, weights_only=True))
    return made


def pickled_model(model):
    return pickle.loads(pickle.dumps(model))


def called_with_weights(model):
    weights = model.state_dict()
    other = build_model(CONFIG, seed=1)
    return lambda *batch: functional_call(other, weights, batch)


@pytest.mark.parametrize(
    "copied",
    [
        emptied,
        assigned,
        saved_whole,
        saved_weights,
        pickled_model,
        copy.deepcopy,
        called_with_weights,
    ],
)
def test_copies(float_model, copied):
    twin = copied(float_model)
    assert_same_outputs(twin, float_model, *model_inputs())
    control = build_model(CONFIG, seed=1)
    assert (
        max_difference(control(*model_inputs()).pooled, float_model(*model_inputs()).pooled) > 0.1
    )


@torch.no_grad()
def pooled_outputs(model):
    return model.fuse(*random_encodings(model)).pooled


def test_a_step_of_lora_merged_and_saved(tmp_path):
    peft = pytest.importorskip("peft")
    heads = ["itm_head", "itc_head"]
    config = peft.LoraConfig(
        r=4, target_modules=["qkv", "down", "key_value"], modules_to_save=heads
    )
    base = build_model(CONFIG)
    start = pooled_outputs(base)
    model = peft.get_peft_model(base, config)
    optimize_for_cpu(base)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("lora_A" in name for name in trained)
    assert all("lora_" in name or "itm_head" in name or "itc_head" in name for name in trained)
    optimizer = torch.optim.SGD(
        [weight for weight in model.parameters() if weight.requires_grad], lr=1.0
    )
    for _ in range(2):
        optimizer.zero_grad()
        fused = model.fuse(*random_encodings(model), "pooled").pooled
        (model.itm_logits(fused).square().sum() + model.pair_embeds(fused)[:, 0].sum()).backward()
        optimizer.step()
    model.eval()
    adapted = pooled_outputs(model)
    assert max_difference(adapted, start) > 0.01
    assert max_difference(model.fuse(*random_encodings(model), "all").pooled, adapted) < ATOL
    with torch.no_grad():
        logits = model.itm_logits(adapted)
        vectors = model.text_embeds(random_encodings(model)[1])

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(build_model(CONFIG), tmp_path / "adapter").eval()
    assert max_difference(pooled_outputs(again), adapted) < ATOL
    with torch.no_grad():
        assert max_difference(again.itm_logits(adapted), logits) < ATOL

    merged = model.merge_and_unload()
    assert isinstance(merged, BridgeTower)
    save(merged, tmp_path / "merged")
    saved = read_checkpoint(tmp_path / "merged").model()
    with torch.no_grad():
        assert max_difference(pooled_outputs(saved), adapted) < ATOL
        assert max_difference(saved.itm_logits(adapted), logits) < ATOL
        assert max_difference(saved.text_embeds(random_encodings(saved)[1]), vectors) < ATOL
