"""The engine that is the model itself, and the choice of an engine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from bridgetower import extras
from bridgetower.checkpoints import read_checkpoint
from bridgetower.engines import engine
from bridgetower.engines.config import ENGINES, Precision, engines_with
from bridgetower.engines.engine import EngineChoice, TorchEngine, choose_engine
from bridgetower.engines.parts import PartsEngine
from bridgetower.model.bridgetower import IMAGE
from bridgetower.model.fusion import FusionOutputs
from helpers.models import build_model, max_difference, random_images, random_texts

CPU = torch.device("cpu")


def model_and_engine(dtype=torch.float32):
    """A model, and an engine with the same weights."""
    return build_model().to(dtype), TorchEngine(build_model(), CPU, dtype)


def linear_weights(module):
    return [child.weight for child in module.modules() if isinstance(child, nn.Linear)]


def packed(engine):
    return {weight.is_mkldnn for weight in linear_weights(engine.model)}


def engine_outputs(model, outputs, dtype=torch.float32):
    pixel_values = random_images(3).to(dtype)
    image = model.encode_image(pixel_values, IMAGE)
    text = model.encode_text(*random_texts([5, 3, 4]))
    return model.fuse(model.cache_image(image), model.cache_text(text), outputs)


class TestNumbers:
    """The model itself: packed weights give its own numbers."""

    @pytest.mark.parametrize("outputs", get_args(FusionOutputs))
    @torch.inference_mode()
    def test_fused(self, outputs):
        model, engine = model_and_engine()
        assert packed(engine) == {False}
        ours = engine_outputs(engine, outputs)
        theirs = engine_outputs(model, outputs)
        assert packed(engine) == {True}
        for name in ("pooled", "text", "image"):
            if getattr(theirs, f"_{name}", None) is not None:
                assert max_difference(getattr(ours, name), getattr(theirs, name)) < 1e-5
        pixel_values = random_images(3)
        cls = [
            runs.encode_image(pixel_values, IMAGE, outputs="cls").cls for runs in (engine, model)
        ]
        assert max_difference(*cls) < 1e-5

    @torch.inference_mode()
    def test_a_part_is_packed_when_it_is_first_used(self):
        _, engine = model_and_engine()
        modules = {
            name: getattr(engine.model, name) for name in ("text", "vision", "fusion", "itc_head")
        }

        def packed_parts():
            return [
                name
                for name, module in modules.items()
                if all(weight.is_mkldnn for weight in linear_weights(module))
            ]

        text = engine.encode_text(*random_texts([5, 3, 4]))
        assert packed_parts() == ["text", "itc_head"]
        image = engine.encode_image(random_images(3))
        assert packed_parts() == ["text", "vision", "itc_head"]
        engine.fuse(engine.cache_image(image), text)
        assert packed_parts() == [*modules]

    @torch.inference_mode()
    def test_number_formats(self):
        """bfloat16 is as near to float32 as the model is, float16 nearer."""
        exact = engine_outputs(model_and_engine()[0], "pooled").pooled
        model, engine = model_and_engine(torch.bfloat16)
        coarse, theirs = (
            engine_outputs(runs, "pooled", torch.bfloat16).pooled.float()
            for runs in (engine, model)
        )
        assert max_difference(coarse, exact) < 2 * max_difference(theirs, exact)
        half = engine_outputs(model_and_engine(torch.float16)[1], "pooled").pooled.float()
        assert 0 < max_difference(half, exact) < 0.25 * max_difference(coarse, exact)
        other = TorchEngine(build_model(seed=1), CPU)
        assert max_difference(engine_outputs(other, "pooled").pooled, exact) > 0.01


# Without the checks of shapes that the tests put around every function, which no graph can hold. Every kind of call, in
# several sizes, then as if there were more kinds than PyTorch keeps graphs.
COMPILED = """
import json
import torch
from torch._dynamo.utils import counters
from bridgetower.engines.engine import TorchEngine
from bridgetower.model import layers
from helpers.models import build_model, changed_config, max_difference, random_images, random_texts

sizes = {f"{part}__num_layers": 1 for part in ("vision", "text", "fusion")}
config = changed_config(fusion__num_token_types=3, **sizes)
model, engine = build_model(config), TorchEngine(build_model(config), torch.device("cpu"), compiler="eager")
off, kinds, graphs = [0.0], set(), []


def check(lengths, padded, token_type, cached, outputs, rows):
    kinds.add((len(lengths) == 1, padded, token_type, cached, outputs, None if rows is None else len(rows) == 1))
    ids, mask = random_texts(lengths)
    found = []
    for each in (engine, model):
        image = each.encode_image(random_images(len(lengths)), token_type)
        text = each.encode_text(ids, mask if padded else None)
        if cached:
            image, text = each.cache_image(image), each.cache_text(text)
        if rows is not None:
            image, text = image[torch.tensor(rows)], text[torch.tensor(rows)]
        fused = each.fuse(image, text, outputs)
        read = {"pooled": ("pooled",), "text": ("text",), "all": ("pooled", "text", "image")}[outputs]
        cls = each.encode_image(random_images(len(lengths)), outputs="cls"), each.encode_text(ids, mask, outputs="cls")
        found.append([*(getattr(fused, name) for name in read), *(one.cls for one in cls)])
    off.extend(max_difference(one, other) for one, other in zip(*found))
    graphs.append(counters["stats"]["unique_graphs"])


def check_all(outputs, cached):
    shapes = [([5], None), ([4], [0, 0, 0]), ([5, 3], None), ([6, 6, 6], [0]), ([7, 2, 4, 5], [3, 1, 1, 0, 2])]
    for lengths, rows in shapes:
        check(lengths, len(set(lengths)) > 1, 1 + cached, cached, outputs, rows)


with torch.inference_mode():
    for outputs, cached in (("pooled", False), ("all", True)):
        check_all(outputs, cached)
    first, ordinary = max(off), graphs[-1]
    layers.GRAPHS = 2
    engine = TorchEngine(build_model(config), torch.device("cpu"), compiler="eager")
    check_all("text", False)
assert graphs[-1] == ordinary
print(json.dumps([len(kinds), ordinary, sum(counters["graph_break"].values()), first, max(off)]))
"""


@pytest.mark.nightly
def test_compiled_in_few_graphs_for_all_kinds_of_calls_and_beyond_their_limit(forked):
    command = [forked / "python", "-c", COMPILED]
    tests = Path(__file__).parents[1]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tests)
    kinds, graphs, breaks, off, beyond = json.loads(result.stdout.splitlines()[-1])
    assert kinds == 15
    assert graphs <= 14  # of images 6, of texts 4, of fusion 2 kinds, for one and for several
    assert breaks == 0
    assert off < 1e-5
    assert beyond < 1e-5


def test_of_a_number_format():
    assert EngineChoice(precision="bf16", device="auto").dtype == torch.bfloat16
    assert EngineChoice().dtype == EngineChoice(engine="onnxruntime").dtype == torch.float32


@pytest.mark.parametrize("precision", get_args(Precision))
def test_auto_takes_the_first_that_is_installed(monkeypatch, precision):
    able = engines_with(precision)
    assert all(precision in ENGINES[engine].forms for engine in able)
    assert choose_engine("auto", precision, "cpu") == able[0]
    monkeypatch.setattr(engine, "is_installed", lambda package: package in ("onnxscript", able[-1]))
    assert choose_engine("auto", precision, "cpu") == able[-1]


def test_auto_takes_none_that_could_not_export_and_torch_on_a_gpu(monkeypatch):
    assert choose_engine("onnxruntime", "fp32", None) == "onnxruntime"
    with monkeypatch.context() as patch:
        patch.setattr(engine, "is_installed", lambda package: package != "onnxscript")
        assert choose_engine("auto", "fp32", "cpu") == "torch"
    monkeypatch.setattr(engine, "find_device", lambda device: torch.device("cuda"))
    assert choose_engine("auto", "fp32", None) == "torch"


@pytest.mark.slow
def test_start(tiny_checkpoint, exported, tmp_path, monkeypatch):
    """An exported folder is not exported again, and a missing package is named."""
    started = EngineChoice(device="cpu", precision="bf16").start(read_checkpoint(tiny_checkpoint))
    assert isinstance(started, TorchEngine)
    assert started.model.token_type_embedding.weight.dtype == torch.bfloat16
    choice = EngineChoice(engine="onnxruntime", cache=tmp_path)
    assert isinstance(choice.start(read_checkpoint(exported), exported), PartsEngine)
    assert list(tmp_path.iterdir()) == []
    names = {"onnxruntime": "onnx", "openvino": "openvino"}
    for name, extra in names.items():
        monkeypatch.setattr(extras, "is_installed", lambda package, name=name: package != name)
        message = rf"the extra '{extra}' is missing: pip install '\.\[{extra}\]' \(package {name}\)"
        with pytest.raises(FileNotFoundError, match=message):
            EngineChoice(engine=name)


WITHOUT_LOCKS = """
import sys
sys.modules["fcntl"] = sys.modules["resource"] = None  # the import of either fails
import bridgetower
model = bridgetower.load(sys.argv[1], device="cpu")
print(*model.embed_texts(["a bar"]).shape)
"""


def test_a_model_is_used_without_fcntl(tiny_checkpoint):
    """Where Python has no file locks, as on Windows, the package is imported and a model is used all the same."""
    command = [sys.executable, "-c", WITHOUT_LOCKS, str(tiny_checkpoint)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "1 8\n"
