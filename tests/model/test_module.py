"""The model is copied, moved, loaded, pickled and wrapped as any module of PyTorch."""

import copy
import pickle
from io import BytesIO

import pytest
import torch
from torch import nn

from bridgetower.engines.engine import TorchEngine
from bridgetower.inference.predictor import load
from bridgetower.model.cpu import optimize_for_cpu, pack_weights
from helpers.models import (
    build_model,
    changed_config,
    max_difference,
    off_defaults,
    random_encodings,
    random_images,
    random_texts,
    same_tensors,
)

CONFIG = changed_config(text__dropout=0.0, fusion__dropout=0.0)
FUSED = CONFIG.override({"heads.itc": "fused"})
ATOL = 1e-5


@torch.no_grad()
def pooled_of(model):
    return model.fuse(*random_encodings(model)).pooled


def is_packed(model):
    return any(parameter.is_mkldnn for parameter in model.parameters())


def through_file(model):
    file = BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.fixture
def used():
    engine = TorchEngine(build_model(CONFIG), torch.device("cpu"))
    with torch.inference_mode():
        engine.fuse(*random_encodings(engine.model))
    assert is_packed(engine.model)
    return engine.model


class TestUsed:
    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, through_file], ids=["deepcopy", "torch.save"]
    )
    def test_copies(self, used, copied):
        expected = pooled_of(used)
        twin = copied(used)
        assert is_packed(used)
        assert same_tensors(twin.state_dict(), used.state_dict())
        assert max_difference(pooled_of(twin), expected) < ATOL
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(pooled_of(used), expected), "they share nothing"

    def test_another_state_dict(self, used):
        other = build_model(CONFIG, seed=1)
        used.load_state_dict(other.state_dict())
        assert is_packed(used)
        assert max_difference(pooled_of(used), pooled_of(other)) < ATOL
        assert same_tensors(used.state_dict(), other.state_dict())

    def test_a_state_dict_that_does_not_fit(self, used):
        state = used.state_dict()
        with pytest.raises(RuntimeError, match="size mismatch"):
            used.load_state_dict(
                state | {"fusion.text_layers.0.mlp.down.weight": torch.zeros(3, 3)}
            )
        assert same_tensors(used.state_dict(), state)

    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
    )
    def test_other_number_formats(self, used, dtype):
        state = used.state_dict()
        assert used.to(dtype) is used
        assert same_tensors(
            used.state_dict(), {name: value.to(dtype) for name, value in state.items()}
        )
        if dtype in (torch.float64, torch.float32):
            pixels = random_images(2).to(dtype)
            texts = random_texts([5, 3])
            theirs = build_model(CONFIG).to(dtype)
            assert max_difference(used(pixels, *texts).pooled, theirs(pixels, *texts).pooled) < ATOL

    def test_another_device(self, used):
        used.to("meta")
        assert {parameter.device.type for parameter in used.parameters()} == {"meta"}
        assert [type(module) for module in used.modules()] == [
            type(module) for module in build_model(CONFIG).modules()
        ]

    def test_it_can_train(self, used):
        twin = copy.deepcopy(used).requires_grad_().train()
        twin.fuse(*random_encodings(twin)).pooled.sum().backward()
        grown = twin.fusion.text_layers[0].mlp.down.weight.grad
        assert grown.abs().sum() > 0


def test_copies_of_a_predictor(tiny_checkpoint):
    predictor = load(tiny_checkpoint, device="cpu")
    texts = ("a red square", "two blue circles")
    unused = copy.deepcopy(predictor)
    expected = predictor.embed_texts(texts)
    for twin in (unused, copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        assert twin.fingerprint == predictor.fingerprint
        assert max_difference(twin.embed_texts(texts), expected) < ATOL


class Adapted(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.weight = base.weight
        self.bias = base.bias
        self.adapter = off_defaults(
            nn.Linear(base.in_features, base.out_features, bias=False), seed=7
        )

    def forward(self, hidden):
        return self.base(hidden) + self.adapter(hidden)


def adapted(model, names):
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in names:
                setattr(parent, name, Adapted(child))


def double_outputs(model, names):
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names:
            module.register_forward_hook(lambda module, arguments, output: 2 * output)


@pytest.mark.parametrize("optimize", [lambda model: None, optimize_for_cpu, pack_weights])
@pytest.mark.parametrize("wrap", [adapted, double_outputs])
class TestWrappedLayers:
    """Layers are called, so that what was put around them takes part, whatever is computed of the model."""

    def made(self, wrap, optimize, *names):
        model = build_model(CONFIG)
        before = pooled_of(model)
        wrap(model, names)
        optimize(model)
        assert max_difference(pooled_of(model), before) > 0.01, (
            "control: the layers do something else"
        )
        return model

    def test_the_first_token_alone(self, wrap, optimize):
        model = self.made(wrap, optimize, "qkv")
        image, text = random_encodings(model)
        assert (
            max_difference(
                model.fuse(image, text, "pooled").pooled, model.fuse(image, text, "all").pooled
            )
            < ATOL
        )
        assert (
            max_difference(model.encode_image(random_images(3), outputs="cls").cls, image.cls)
            < ATOL
        )
        assert (
            max_difference(model.encode_text(*random_texts([5, 3, 4]), outputs="cls").cls, text.cls)
            < ATOL
        )

    def test_with_gradients(self, wrap, optimize):
        for name in ("up", "down"):
            model = self.made(wrap, optimize, name)
            assert (
                max_difference(model.fuse(*random_encodings(model)).pooled, pooled_of(model)) < ATOL
            )


def test_what_a_hook_was_given_stays_as_it_was():
    model = build_model(CONFIG)
    seen = []
    optimize_for_cpu(model)
    up = model.fusion.text_layers[0].mlp.up
    up.register_forward_hook(
        lambda module, arguments, output: seen.append((output, output.clone()))
    )
    pooled_of(model)
    assert all(torch.equal(*pair) for pair in seen)
