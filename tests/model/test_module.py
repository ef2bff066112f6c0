"""The model as any module of PyTorch: copied, moved, loaded and pickled, also once its weights are packed; wrapped."""

import copy
import pickle
from io import BytesIO

import pytest
import torch
from torch import nn

import tiny
from bridgetower.engines.engine import TorchEngine
from bridgetower.inference.predictor import load
from bridgetower.model.cpu import optimize_for_cpu, pack_weights

CONFIG = tiny.changed(text__dropout=0.0, fusion__dropout=0.0)
FUSED = CONFIG.override({"heads.itc": "fused"})
ATOL = 1e-5


@torch.no_grad()
def pooled(model):
    return model.fuse(*tiny.encodings(model)).pooled


def is_packed(model):
    return any(parameter.is_mkldnn for parameter in model.parameters())


def through_file(model):
    file = BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.fixture
def used():
    engine = TorchEngine(tiny.build(CONFIG), torch.device("cpu"))
    with torch.inference_mode():
        engine.fuse(*tiny.encodings(engine.model))
    assert is_packed(engine.model)
    return engine.model


class TestUsed:
    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, through_file], ids=["deepcopy", "torch.save"]
    )
    def test_copies(self, used, copied):
        expected = pooled(used)
        twin = copied(used)
        assert is_packed(used)
        assert tiny.equal(twin.state_dict(), used.state_dict())
        assert tiny.off(pooled(twin), expected) < ATOL
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(pooled(used), expected), "they share nothing"

    def test_another_state_dict(self, used):
        other = tiny.build(CONFIG, seed=1)
        used.load_state_dict(other.state_dict())
        assert is_packed(used)
        assert tiny.off(pooled(used), pooled(other)) < ATOL
        assert tiny.equal(used.state_dict(), other.state_dict())

    def test_a_state_dict_that_does_not_fit(self, used):
        state = used.state_dict()
        with pytest.raises(RuntimeError, match="size mismatch"):
            used.load_state_dict(
                state | {"fusion.text_layers.0.mlp.down.weight": torch.zeros(3, 3)}
            )
        assert tiny.equal(used.state_dict(), state)

    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
    )
    def test_other_number_formats(self, used, dtype):
        state = used.state_dict()
        assert used.to(dtype) is used
        assert tiny.equal(
            used.state_dict(), {name: value.to(dtype) for name, value in state.items()}
        )
        if dtype in (torch.float64, torch.float32):
            pixels = tiny.images(2).to(dtype)
            texts = tiny.texts([5, 3])
            theirs = tiny.build(CONFIG).to(dtype)
            assert tiny.off(used(pixels, *texts).pooled, theirs(pixels, *texts).pooled) < ATOL

    def test_another_device(self, used):
        used.to("meta")
        assert {parameter.device.type for parameter in used.parameters()} == {"meta"}
        assert [type(module) for module in used.modules()] == [
            type(module) for module in tiny.build(CONFIG).modules()
        ]

    def test_it_can_train(self, used):
        twin = copy.deepcopy(used).requires_grad_().train()
        twin.fuse(*tiny.encodings(twin)).pooled.sum().backward()
        grown = twin.fusion.text_layers[0].mlp.down.weight.grad
        assert grown.abs().sum() > 0


def test_copies_of_a_predictor(tiny_checkpoint):
    predictor = load(tiny_checkpoint, device="cpu")
    texts = ("a red square", "two blue circles")
    unused = copy.deepcopy(predictor)
    expected = predictor.embed_texts(texts)
    for twin in (unused, copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        assert twin.fingerprint == predictor.fingerprint
        assert tiny.off(twin.embed_texts(texts), expected) < ATOL


class Adapted(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.weight = base.weight
        self.bias = base.bias
        self.adapter = tiny.off_defaults(
            nn.Linear(base.in_features, base.out_features, bias=False), seed=7
        )

    def forward(self, hidden):
        return self.base(hidden) + self.adapter(hidden)


def adapted(model, names):
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in names:
                setattr(parent, name, Adapted(child))


def doubled(model, names):
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names:
            module.register_forward_hook(lambda module, given, output: 2 * output)


@pytest.mark.parametrize("optimize", [lambda model: None, optimize_for_cpu, pack_weights])
@pytest.mark.parametrize("wrap", [adapted, doubled])
class TestWrappedLayers:
    """Layers are called, so that what was put around them takes part, whatever is computed of the model."""

    def made(self, wrap, optimize, *names):
        model = tiny.build(CONFIG)
        before = pooled(model)
        wrap(model, names)
        optimize(model)
        assert tiny.off(pooled(model), before) > 0.01, "control: the layers do something else"
        return model

    def test_the_first_token_alone(self, wrap, optimize):
        model = self.made(wrap, optimize, "qkv")
        image, text = tiny.encodings(model)
        assert (
            tiny.off(
                model.fuse(image, text, "pooled").pooled, model.fuse(image, text, "all").pooled
            )
            < ATOL
        )
        assert tiny.off(model.encode_image(tiny.images(3), outputs="cls").cls, image.cls) < ATOL
        assert (
            tiny.off(model.encode_text(*tiny.texts([5, 3, 4]), outputs="cls").cls, text.cls) < ATOL
        )

    def test_with_gradients(self, wrap, optimize):
        for name in ("up", "down"):
            model = self.made(wrap, optimize, name)
            assert tiny.off(model.fuse(*tiny.encodings(model)).pooled, pooled(model)) < ATOL


def test_what_a_hook_was_given_stays_as_it_was():
    model = tiny.build(CONFIG)
    kept = []
    optimize_for_cpu(model)
    up = model.fusion.text_layers[0].mlp.up
    up.register_forward_hook(lambda module, given, output: kept.append((output, output.clone())))
    pooled(model)
    assert all(torch.equal(*pair) for pair in kept)
