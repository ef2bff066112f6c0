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
from bridgetower.model.encodings import Fused
from bridgetower.model.fusion import FusionOutputs

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


def test_control_the_numbers_are_of_these_weights() -> None:
    engine = TorchEngine(tiny.build(seed=1), CPU)
    assert tiny.off(fused(engine, "pooled").pooled, fused(made()[0], "pooled").pooled) > 0.01


# Without the checks of shapes that the tests put around every function, which no graph can hold. Compiles, then uses
# texts of other lengths in batches of other sizes.
COMPILED = """
import json
import torch
from torch._dynamo.utils import counters
import tiny
from bridgetower.engines.engine import TorchEngine

model, engine = tiny.build(), TorchEngine(tiny.build(), torch.device("cpu"), compiler="aot_eager")
graphs, off = [], []
with torch.inference_mode():
    for lengths in ([5, 3], [7, 4], [2, 6, 8, 8], [9, 1, 3, 5, 6]):
        pixel_values, texts = tiny.images(len(lengths)), tiny.texts(lengths)
        ours, theirs = (
            each.fuse(each.encode_image(pixel_values, 1), each.encode_text(*texts)) for each in (engine, model)
        )
        off.append(tiny.off(ours.pooled, theirs.pooled))
        graphs.append(counters["stats"]["unique_graphs"])
print(json.dumps([graphs, sum(counters["graph_break"].values()), max(off)]))
"""


@pytest.mark.slow
def test_compiled_without_graph_breaks_and_once_for_all_lengths() -> None:
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    command = [sys.executable, "-c", COMPILED]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    graphs, breaks, off = json.loads(result.stdout.splitlines()[-1])
    assert graphs == [3] * 4  # of image, text and fusion
    assert breaks == 0
    assert off < 1e-5
