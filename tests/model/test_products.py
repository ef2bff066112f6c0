"""Which library computes float32 products, by the processor or set by hand, and a model without oneDNN."""

from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bridgetower.model import cpu
from bridgetower.model.cpu import (
    LIBRARIES,
    VARIABLE,
    OneDnnLinear,
    onednn_is_faster,
    optimize_for_cpu,
    pack_weights,
)
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.pretraining import PretrainingTask
from helpers.models import build_model, max_difference, random_caption_batch, random_encodings

ATOL = 1e-5


@pytest.fixture(autouse=True)
def _chosen_anew(monkeypatch):
    monkeypatch.delenv(VARIABLE)
    onednn_is_faster.cache_clear()
    yield
    onednn_is_faster.cache_clear()


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def matched(model):
    with Operators() as operators, torch.inference_mode():
        pack_weights(model)
        image, text = random_encodings(model)
        logits = model.itm_head(model.fuse(image, text).pooled)
    return logits, any("mkldnn" in name for name in operators.names)


@pytest.mark.parametrize(
    ("processor", "outputs", "gradients"),
    [
        ("vendor_id\t: AuthenticAMD\nflags\t: avx2 avx512f", True, True),
        ("vendor_id\t: GenuineIntel\nflags\t: avx2 avx512f", True, False),
        ("vendor_id\t: GenuineIntel\nflags\t: avx2 amx_tile amx_bf16", False, False),
        ("", True, True),
    ],
    ids=["AMD", "Intel", "Intel with AMX", "unknown"],
)
def test_decided_by_the_processor(processor, outputs, gradients, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "_CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(processor)
    assert onednn_is_faster("outputs") == outputs
    assert onednn_is_faster("gradients") == gradients


def test_outputs_and_gradients_have_libraries_of_their_own(monkeypatch):
    torch.manual_seed(0)
    layer = OneDnnLinear(24, 40)
    hidden = torch.randn(3, 7, 24, requires_grad=True)
    expected = torch.nn.functional.linear(hidden, layer.weight, layer.bias)
    twice = 2 * expected.detach().flatten(0, 1)
    gradients = [
        (twice @ layer.weight).view_as(hidden),
        twice.T @ hidden.flatten(0, 1),
        twice.sum(dim=0),
    ]
    for libraries in product(LIBRARIES, repeat=2):
        faster = dict(zip(("outputs", "gradients"), libraries, strict=True))

        def uses_onednn(products, faster=faster):
            return faster[products] == "onednn"

        monkeypatch.setattr(cpu, "onednn_is_faster", uses_onednn)
        with Operators() as of_output:
            output = layer(hidden)
        with Operators() as of_gradients:
            output.square().sum().backward()
        for name, operators in (("outputs", of_output), ("gradients", of_gradients)):
            assert ("mkldnn._linear_pointwise.default" in operators.names) == (
                faster[name] == "onednn"
            )
        assert max_difference(output, expected) < ATOL
        for tensor, gradient in zip((hidden, layer.weight, layer.bias), gradients, strict=True):
            assert max_difference(tensor.grad, gradient) < ATOL * gradient.abs().max()
            tensor.grad = None


def test_set_by_hand(monkeypatch):
    logits = {}
    for library in LIBRARIES:
        monkeypatch.setenv(VARIABLE, library)
        onednn_is_faster.cache_clear()
        logits[library], used = matched(build_model())
        assert used == (library == "onednn")
    assert max_difference(logits["torch"], logits["onednn"]) < ATOL
    monkeypatch.setenv(VARIABLE, "mkl")
    onednn_is_faster.cache_clear()
    with pytest.raises(
        ValueError, match=r"BRIDGETOWER_PRODUCTS is 'mkl'; set it to one of onednn, torch"
    ):
        onednn_is_faster("outputs")


class Lacking:
    def __init__(self, whole, name):
        self._whole = whole
        self._name = name

    def __getattr__(self, name):
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._whole, name)


@pytest.mark.parametrize(
    "operator",
    [
        "_linear_pointwise",
        "_reorder_linear_weight",
        "_is_mkldnn_bf16_supported",
        "_softmax_backward_data",
    ],
)
def test_a_release_without_a_private_operator(operator, monkeypatch):
    if hasattr(torch, operator):
        monkeypatch.delattr(torch, operator)
    else:
        monkeypatch.setattr(torch.ops, "mkldnn", Lacking(torch.ops.mkldnn, operator))
    plain = build_model()
    model = build_model()
    ours, used = matched(model)
    assert not used
    assert [type(module) for module in model.modules()] == [
        type(module) for module in plain.modules()
    ]
    with torch.no_grad():
        assert (
            max_difference(ours, plain.itm_head(plain.fuse(*random_encodings(plain)).pooled)) < ATOL
        )
    optimize_for_cpu(plain.train())
    plain.fuse(*random_encodings(plain)).pooled.sum().backward()


class TestWithoutOneDnn:
    @pytest.fixture(autouse=True)
    def _none(self, monkeypatch):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        with torch.backends.mkldnn.flags(enabled=False):
            yield

    def test_matching(self):
        (ours, used) = matched(build_model())
        plain = build_model()
        assert not used
        with torch.no_grad():
            assert (
                max_difference(ours, plain.itm_head(plain.fuse(*random_encodings(plain)).pooled))
                < ATOL
            )

    def test_a_step(self):
        results = []
        for model in (build_model(), build_model()):
            if results:
                optimize_for_cpu(model)
                assert any(isinstance(module, OneDnnLinear) for module in model.modules())
            task = PretrainingTask(
                model, PretrainingConfig(phases=(Phase(mlm=1.0, itm=1.0, itc=1.0),))
            )
            with Operators() as operators:
                task(random_caption_batch((0, 1, 2, 3), (5, 3, 4, 6))).total.backward()
            assert not any("mkldnn" in name for name in operators.names)
            results.append(
                {
                    name: value.grad
                    for name, value in model.named_parameters()
                    if value.grad is not None
                }
            )
        for name, gradient in results[0].items():
            assert max_difference(gradient, results[1][name]) < ATOL * max(1, gradient.abs().max())
