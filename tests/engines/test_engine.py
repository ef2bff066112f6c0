"""The engine that is the model itself: packed weights give the model's own numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

import tiny
from bridgetower.engines.engine import TorchEngine
from bridgetower.model.bridgetower import IMAGE, BridgeTower
from bridgetower.model.fusion import Fused, FusionOutputs

CPU = torch.device("cpu")


def made(dtype: torch.dtype = torch.float32) -> tuple[BridgeTower, TorchEngine]:
    """A model, and an engine with the same weights."""
    return tiny.build().to(dtype), TorchEngine(tiny.build(), CPU, dtype)


def packed(engine: TorchEngine) -> set[bool]:
    return {module.weight.is_mkldnn for module in engine.model.modules() if isinstance(module, nn.Linear)}


def fused(model: BridgeTower | TorchEngine, outputs: FusionOutputs, dtype: torch.dtype = torch.float32) -> Fused:
    pixel_values = tiny.images(3).to(dtype)
    image, text = model.encode_image(pixel_values, IMAGE), model.encode_text(*tiny.texts([5, 3, 4]))
    return model.fuse(model.cache_image(image), model.cache_text(text), outputs)


@pytest.mark.parametrize("outputs", get_args(FusionOutputs))
@torch.inference_mode()
def test_fused(outputs: FusionOutputs) -> None:
    model, engine = made()
    assert packed(engine) == {False}
    ours, theirs = fused(engine, outputs), fused(model, outputs)
    assert packed(engine) == {True}
    for name in ("pooled", "text", "image"):
        if getattr(theirs, f"_{name}", None) is not None:
            assert tiny.off(getattr(ours, name), getattr(theirs, name)) < 1e-5


@torch.inference_mode()
def test_cls() -> None:
    model, engine = made()
    pixel_values = tiny.images(3)
    ours, theirs = (each.encode_image(pixel_values, IMAGE, outputs="cls").cls for each in (engine, model))
    assert tiny.off(ours, theirs) < 1e-5


@torch.inference_mode()
def test_bfloat16_is_as_near_to_float32_as_the_model_is() -> None:
    exact = fused(made()[0], "pooled").pooled
    model, engine = made(torch.bfloat16)
    ours, theirs = (fused(each, "pooled", torch.bfloat16).pooled.float() for each in (engine, model))
    assert tiny.off(ours, exact) < 2 * tiny.off(theirs, exact)


@torch.inference_mode()
def test_float16_is_nearer_to_float32_than_bfloat16() -> None:
    exact = fused(made()[0], "pooled").pooled
    off = [tiny.off(fused(made(dtype)[1], "pooled").pooled.float(), exact) for dtype in (torch.float16, torch.bfloat16)]
    assert 0 < off[0] < 0.25 * off[1]


def test_control_the_numbers_are_of_these_weights() -> None:
    engine = TorchEngine(tiny.build(seed=1), CPU)
    assert tiny.off(fused(engine, "pooled").pooled, fused(made()[0], "pooled").pooled) > 0.01


# Without the checks of shapes that the tests put around every function, which no graph can hold. Every kind of call, in
# several sizes, then as if there were more kinds than PyTorch keeps graphs.
COMPILED = """
import json
import torch
from torch._dynamo.utils import counters
import tiny
from bridgetower.engines.engine import TorchEngine

layers = {"vision__num_layers": 2, "text__num_layers": 2}
config = tiny.changed(fusion__num_token_types=3, **layers)
model, engine = tiny.build(config), TorchEngine(tiny.build(config), torch.device("cpu"), compiler="eager")
off, kinds, graphs = [0.0], set(), []


def check(lengths, padded, token_type, cached, outputs, rows):
    kinds.add((len(lengths) == 1, padded, token_type, cached, outputs, None if rows is None else len(rows) == 1))
    ids, mask = tiny.texts(lengths)
    found = []
    for each in (engine, model):
        image = each.encode_image(tiny.images(len(lengths)), token_type)
        text = each.encode_text(ids, mask if padded else None)
        if cached:
            image, text = each.cache_image(image), each.cache_text(text)
        if rows is not None:
            image, text = image[torch.tensor(rows)], text[torch.tensor(rows)]
        fused = each.fuse(image, text, outputs)
        read = {"pooled": ("pooled",), "text": ("text",), "all": ("pooled", "text", "image")}[outputs]
        cls = each.encode_image(tiny.images(len(lengths)), outputs="cls"), each.encode_text(ids, mask, outputs="cls")
        found.append([*(getattr(fused, name) for name in read), *(one.cls for one in cls)])
    off.extend(tiny.off(one, other) for one, other in zip(*found))
    graphs.append(counters["stats"]["unique_graphs"])


def check_all(outputs, cached):
    shapes = [([5], None), ([4], [0, 0, 0]), ([5, 3], None), ([6, 6, 6], [0]), ([7, 2, 4, 5], [3, 1, 1, 0, 2])]
    for lengths, rows in shapes:
        check(lengths, len(set(lengths)) > 1, 1 + cached, cached, outputs, rows)


with torch.inference_mode():
    for outputs, cached in (("pooled", False), ("pooled", True), ("all", True)):
        check_all(outputs, cached)
    first, ordinary = max(off), graphs[-1]
    torch._dynamo.config.cache_size_limit = 2
    check_all("text", False)
assert graphs[-1] == ordinary
print(json.dumps([len(kinds), ordinary, sum(counters["graph_break"].values()), first, max(off)]))
"""


@pytest.mark.slow
def test_compiled_in_few_graphs_for_all_kinds_of_calls_and_beyond_their_limit() -> None:
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    command = [sys.executable, "-c", COMPILED]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    kinds, graphs, breaks, off, beyond = json.loads(result.stdout.splitlines()[-1])
    assert kinds == 20
    assert graphs <= 16  # of images 6, of texts 4, of fusion 3 kinds, for one and for several
    assert breaks == 0
    assert off < 1e-5
    assert beyond < 1e-5
