"""Kernels for a CPU have the values, gradients and names of PyTorch's."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bridgetower.model.config import Activation
from bridgetower.model.cpu import (
    BlockedAttention,
    OneDnnLinear,
    SharedDrawDropout,
    draw_mask,
    linear,
    optimize_for_cpu,
    pack_weights,
)
from bridgetower.model.fusion import FusionOutputs
from bridgetower.model.layers import activate
from bridgetower.model.presets import meter
from bridgetower.objectives.config import Phase, PretrainingConfig
from bridgetower.objectives.pretraining import PretrainingTask
from helpers.models import (
    SMALL_CONFIG,
    build_model,
    length_mask,
    max_difference,
    normal_float64,
    off_defaults,
    random_caption_batch,
    random_encodings,
    random_images,
    random_texts,
)

ATOL = 1e-5
EXACT = 1e-10
VARIANTS = {"bridges": SMALL_CONFIG, "meter": meter(SMALL_CONFIG)}
WIDTH = 12
HEADS = 3
LARGE = 700  # positions whose scores of one head are a block of their own
RATE = 0.3


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients_of_leaves(output, leaves):
    return torch.autograd.grad(output, leaves, random(*output.shape, seed=9))


def made_linear(inputs, outputs):
    layer = nn.Linear(inputs, outputs)
    optimize_for_cpu(layer)
    assert isinstance(layer, OneDnnLinear)
    return layer


def attend(query, key, value, *, mask, dropout):
    return BlockedAttention(HEADS, dropout)(query, key, value, mask)


def optimized():
    model = build_model()
    optimize_for_cpu(model)
    return model


def check_gradients(ours, theirs, leaves, atol=1e-5):
    assert max_difference(ours, theirs) < atol
    cotangent = random(*theirs.shape, seed=9).to(theirs.dtype)
    expected = torch.autograd.grad(theirs, leaves, cotangent)
    for actual, reference in zip(
        torch.autograd.grad(ours, leaves, cotangent), expected, strict=True
    ):
        assert max_difference(actual, reference) < atol


class TestWholeModel:
    @staticmethod
    def step(model):
        task = PretrainingTask(
            model, PretrainingConfig(phases=(Phase(mlm=1.0, itm=1.0, itc=1.0, negatives="hard"),))
        )
        losses = task(random_caption_batch((0, 1, 2, 3), (5, 3, 4, 6)))
        losses.total.backward()
        results = {
            name: value.grad for name, value in model.named_parameters() if value.grad is not None
        }
        return results | {name: value.detach() for name, value in losses.terms.items()}

    @pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
    def test_losses_and_gradients(self, config):
        plain = build_model(config)
        ours = build_model(config)
        names = list(plain.state_dict())
        optimize_for_cpu(ours)
        assert list(ours.state_dict()) == names
        expected = self.step(plain)
        actual = self.step(ours)
        assert expected.keys() == actual.keys()
        assert [
            n
            for n in expected
            if max_difference(expected[n], actual[n]) > ATOL * max(1, expected[n].abs().max())
        ] == []

    def test_every_kernel_is_in_use(self):
        before, after = (
            {type(module).__name__ for module in model.modules()}
            for model in (build_model(), optimized())
        )
        swapped = (
            "BridgeTower DotProductAttention Dropout FeedForward LayerNorm Linear SelfAttention"
        )
        assert before - after == set(swapped.split())


@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 3, 4, 24)], ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_values_and_gradients(shape, biased):
    leaves = [random(*shape).requires_grad_(), random(10, 24, seed=1).requires_grad_()]
    leaves += [random(10, seed=2).requires_grad_()] * biased
    hidden, weight, bias = leaves if biased else (*leaves, None)
    check_gradients(linear(hidden, weight, bias), F.linear(hidden, weight, bias), leaves)


class TestNormalisedInput:
    """A product whose input is the output of a LayerNorm, which is computed again for the gradient of the weight."""

    @staticmethod
    def layers():
        norm = nn.LayerNorm(24, eps=1e-3)
        layer = made_linear(24, 10)
        with torch.no_grad():
            norm.weight.copy_(random(24, seed=3))
            norm.bias.copy_(random(24, seed=4))
        return norm, layer, random(2, 5, 24).requires_grad_()

    @staticmethod
    def kept(run):
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: tensors.append(tensor) or tensor, lambda saved: saved
        ):
            run()
        return [tensor for tensor in tensors if tensor.shape == (2, 5, 24)]

    @pytest.mark.parametrize("changed", [False, True], ids=["as it is", "changed in place"])
    def test_gradients(self, changed):
        norm, layer, hidden = self.layers()
        leaves = [hidden, *norm.parameters(), *layer.parameters()]

        def output():
            normalised = norm(hidden)
            return layer(normalised.mul_(2) if changed else normalised)

        expected = gradients_of_leaves(output(), leaves)
        optimize_for_cpu(norm)
        for actual, reference in zip(gradients_of_leaves(output(), leaves), expected, strict=True):
            assert torch.equal(actual, reference)

    def test_only_the_input_of_the_norm_is_kept(self):
        norm, layer, hidden = self.layers()
        before = self.kept(lambda: layer(norm(hidden)))
        assert {tensor.data_ptr() for tensor in before} > {hidden.data_ptr()}, (
            "control: the output too"
        )
        optimize_for_cpu(norm)
        assert {tensor.data_ptr() for tensor in self.kept(lambda: layer(norm(hidden)))} == {
            hidden.data_ptr()
        }


def test_parts_of_tensors():
    """Operands that are not dense: the first tokens of each text, the first rows of a weight, a transposed gradient."""
    hidden = random(3, 6, 24).requires_grad_()
    weight = random(30, 24, seed=1).requires_grad_()
    ours, theirs = (
        product(hidden[:, :2], weight[10:20], None).mT for product in (linear, F.linear)
    )
    check_gradients(ours, theirs, [hidden, weight])


def test_frozen_parts_get_no_gradient():
    for frozen in range(3):
        leaves = [random(4, 8), random(6, 8, seed=1), random(6, seed=2)]
        for number, leaf in enumerate(leaves):
            leaf.requires_grad_(number != frozen)
        linear(*leaves).sum().backward()
        assert [leaf.grad is None for leaf in leaves] == [number == frozen for number in range(3)]


@pytest.mark.parametrize("activation", get_args(Activation))
class TestActivatedInput:
    def test_values_and_gradients(self, activation):
        hidden = random(2, 5, 24).requires_grad_()
        weight = random(10, 24, seed=1).requires_grad_()
        leaves = [hidden, weight, random(10, seed=2).requires_grad_()]
        ours = linear(hidden, weight, leaves[2], activation)
        theirs = F.linear(activate(hidden, activation), weight, leaves[2])
        plain = linear(hidden, weight, leaves[2])
        off = (
            gradients_of_leaves(plain, leaves)[0]
            - torch.autograd.grad(theirs, hidden, random(2, 5, 10, seed=9), True)[0]
        )
        assert off.abs().max() > 0.1, "control: without the activation"
        check_gradients(ours, theirs, leaves)

    def test_gradients_where_pytorch_computes_the_product(self, activation):
        hidden = normal_float64(2, 5, 24).requires_grad_()
        weight = normal_float64(10, 24, seed=1).requires_grad_()
        ours = linear(hidden, weight, None, activation)
        theirs = F.linear(activate(hidden, activation), weight)
        check_gradients(ours, theirs, [hidden, weight], EXACT)

    def test_it_is_not_kept_for_the_gradient(self, activation):
        up = made_linear(8, 6)
        down = made_linear(6, 4)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor) or tensor, lambda packed: packed
        ):
            hidden = up(random(5, 8))
            linear(hidden, down.weight, down.bias, activation)
            assert [tensor.shape for tensor in saved if tensor.shape[0] == 5] == [(5, 8), (5, 6)]
            F.linear(activate(hidden, activation), down.weight)
        assert len([tensor for tensor in saved if tensor.shape == (5, 6)]) > 2, (
            "control: apart, both are kept"
        )

    def test_a_packed_weight_elsewhere_and_without_gradients(self, activation):
        layer = made_linear(24, 10)
        hidden = random(3, 24)
        hidden_copy = hidden.clone()
        expected = F.linear(activate(hidden, activation), layer.weight, layer.bias)
        with torch.no_grad():
            assert (
                max_difference(linear(hidden, layer.weight, layer.bias, activation), expected)
                < ATOL
            )
        doubled = linear(hidden.double(), layer.weight.double(), layer.bias.double(), activation)
        assert max_difference(doubled, expected.double()) < ATOL
        pack_weights(layer)
        assert layer.weight.is_mkldnn
        assert max_difference(linear(hidden, layer.weight, layer.bias, activation), expected) < ATOL
        assert torch.equal(hidden, hidden_copy)


class TestElsewhere:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_other_number_formats(self, dtype):
        layer = made_linear(8, 6).to(dtype)
        hidden = random(3, 8).to(dtype)
        assert torch.equal(layer(hidden), F.linear(hidden, layer.weight, layer.bias))
        pack_weights(layer)
        assert layer.weight.is_mkldnn == (
            dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )

    def test_autocast_and_no_rows(self):
        layer = made_linear(8, 6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(random(3, 8)).dtype == torch.bfloat16
        output = layer(random(0, 5, 8))
        assert output.shape == (0, 5, 6)
        output.sum().backward()
        assert layer.weight.grad is not None
        assert not layer.weight.grad.any()


class TestPacked:
    @staticmethod
    def made(dtype=torch.float32):
        plain, packed = (off_defaults(made_linear(24, 10)).to(dtype) for _ in range(2))
        pack_weights(packed)
        return plain, packed

    @pytest.mark.parametrize("shape", [(24,), (2, 5, 24), (2, 0, 24)], ids=str)
    def test_values_and_gradients_of_inputs(self, shape):
        plain, packed = self.made()
        assert packed.weight.is_mkldnn
        assert not plain.weight.is_mkldnn
        hidden = random(*shape).requires_grad_()
        ours = packed(hidden)
        theirs = F.linear(hidden, plain.weight, plain.bias)
        torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=0)
        if ours.numel():
            check_gradients(ours, theirs, [hidden])

    def test_bfloat16_is_as_near_to_float32_as_pytorch_is(self):
        plain, packed = self.made(torch.bfloat16)
        hidden = random(50, 24).bfloat16()
        exact = F.linear(hidden.double(), plain.weight.double(), plain.bias.double())
        ours = packed(hidden)
        assert ours.dtype == torch.bfloat16
        assert max_difference(ours.double(), exact) < 2 * max_difference(
            plain(hidden).double(), exact
        )

    @pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bfloat16"
    )
    @pytest.mark.parametrize("autocast", [True, False])
    def test_bfloat16_products_of_a_float32_model(self, autocast):
        plain, packed = self.made()
        pack_weights(packed, torch.bfloat16)
        hidden = random(2, 5, 24)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            expected = plain(hidden)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            ours = packed(hidden)
        assert ours.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(ours, expected)
        assert not torch.equal(ours.float(), plain(hidden))

    def test_in_inference_mode(self):
        model = build_model()
        with torch.inference_mode():
            pack_weights(model)
        assert not any(parameter.is_inference() for parameter in model.parameters())
        build_model(seed=1).load_state_dict(model.state_dict(), assign=True)

    def test_it_stays_packed_when_a_move_fails(self):
        def fail(tensor):
            raise RuntimeError("out of memory")

        plain, packed = self.made()
        with pytest.raises(RuntimeError, match="out of memory"):
            packed._apply(fail)
        assert packed.weight.is_mkldnn
        assert torch.equal(packed.weight.to_dense(), plain.weight)

    def test_nothing_stays_of_what_was_loaded(self):
        layer = made_linear(24, 10)
        loaded = {parameter.data_ptr() for parameter in layer.parameters()}
        pack_weights(layer)
        assert layer.bias.data_ptr() not in loaded


def streams(samples, queries, keys):
    """Query, key and value as the layers make them: parts of wider tensors."""
    query = normal_float64(samples, queries, WIDTH)
    key, value = normal_float64(samples, keys, 2 * WIDTH, seed=1).chunk(2, dim=-1)
    return [tensor.detach().requires_grad_() for tensor in (query, key, value)]


def fused_step(query, key, value, mask):
    split = [tensor.unflatten(-1, (HEADS, -1)).transpose(1, 2) for tensor in (query, key, value)]
    hidden = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(*split, attn_mask=hidden).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("samples", "queries", "keys", "mask"),
    [
        (2, 4, 5, None),
        (2, 4, 5, length_mask(5, 3)),
        (3, 1, 6, length_mask(1, 6, 2)),
        (2, LARGE, LARGE, length_mask(LARGE, 400)),
        (8000, 5, 5, None),
    ],
    ids=["everything", "masked", "one query", "several blocks", "several blocks of small heads"],
)
def test_attention_values_and_gradients_are_those_of_pytorch(samples, queries, keys, mask):
    leaves = streams(samples, queries, keys)
    check_gradients(
        attend(*leaves, mask=mask, dropout=0.0), fused_step(*leaves, mask), leaves, EXACT
    )


def test_attention_of_no_samples():
    leaves = streams(0, 4, 5)
    attend(*leaves, mask=None, dropout=0.5).sum().backward()
    assert [leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves] == [
        True
    ] * 3


@pytest.mark.parametrize(("threads", "heads"), [(1, 2), (4, 8), (64, 24)])
def test_scores_in_work_at_once_follow_the_threads(threads, heads, monkeypatch):
    """Two MiB of each: 24 heads of 512 x 512 numbers of four bytes."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    query = torch.zeros(8, 512, WIDTH)
    with Products() as products:
        attend(query, query, query, mask=None, dropout=0.0)
    assert products.shapes == [(heads, 512, 512)] * (24 // heads)


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.shapes += [tuple(result.shape)] if func is torch.ops.aten.baddbmm.out else []
        return result


@pytest.mark.parametrize(
    ("length", "stored"), [(6, True), (40, False)], ids=["few weights", "many weights"]
)
def test_few_weights_are_kept_for_the_gradients(length, stored):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda packed: packed
    ):
        attend(*streams(2, length, length), mask=None, dropout=0.0)
    assert ((2 * HEADS, length, length) in [tensor.shape for tensor in saved]) == stored


@pytest.mark.parametrize("keys", [5, LARGE])
def test_dropout_of_weights(keys):
    leaves = streams(2, keys, keys)
    rate = 0.4
    torch.manual_seed(0)
    ours = attend(*leaves, mask=None, dropout=rate)
    torch.manual_seed(0)
    mask = draw_mask((2, HEADS, keys, keys), rate)
    query, key, value = (tensor.unflatten(-1, (HEADS, -1)).transpose(1, 2) for tensor in leaves)
    weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1) * mask / (1 - rate)
    check_gradients(ours, (weights @ value).transpose(1, 2).flatten(2), leaves, EXACT)


def test_attention_in_bfloat16_is_as_near_to_float32_as_pytorch_is():
    leaves = [tensor.bfloat16() for tensor in streams(2, 40, 40)]
    exact = fused_step(*(tensor.double() for tensor in leaves), None)
    ours = attend(*leaves, mask=None, dropout=0.0)
    assert ours.dtype == torch.bfloat16
    assert max_difference(ours.double(), exact) < 3 * max_difference(
        fused_step(*leaves, None).double(), exact
    )


def drawn_masks(hidden, rate=RATE, seed=0):
    torch.manual_seed(seed)
    return SharedDrawDropout(rate)(hidden)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_draws(rate):
    """Four values share a draw of 64 bits, so each fourth is counted by itself, and they are independent."""
    torch.manual_seed(0)
    count = 100_000
    mask = draw_mask((count, 4), rate)
    assert set(mask.unique().tolist()) == {0, 1}
    assert (mask.double().mean(dim=0) - (1 - rate)).abs().max() < 5 * (
        rate * (1 - rate) / count
    ) ** 0.5
    assert (torch.corrcoef(mask.double().T) - torch.eye(4)).abs().max() < 0.02


@pytest.mark.parametrize("rate", [1e-9, 7e-6, 1 - 7e-6, 1 - 1e-9])
def test_rates_next_to_0_and_1(rate):
    torch.manual_seed(0)
    mask = draw_mask((4000, 1000), rate)
    assert mask.dtype == torch.int8
    count = 4e6
    assert abs(int(mask.sum()) - count * (1 - rate)) < 5 * (count * rate * (1 - rate)) ** 0.5 + 1
    hidden = torch.ones(50, 7, requires_grad=True)
    drawn_masks(hidden, rate).sum().backward()
    attend(*streams(2, 4, 5), mask=None, dropout=rate).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dropped_values_are_zero_or_scaled_and_gradients_take_the_same_draws(dtype):
    hidden = (torch.rand(50, 7, dtype=dtype) + 1).requires_grad_()
    output = drawn_masks(hidden)
    assert output.dtype == dtype
    is_kept = output != 0
    assert 0 < is_kept.double().mean() < 1
    torch.testing.assert_close(output[is_kept], hidden[is_kept] / (1 - RATE))
    output.sum().backward()
    torch.testing.assert_close(hidden.grad, (is_kept / (1 - RATE)).to(dtype))


def test_nothing_is_dropped_in_evaluation_or_at_rate_zero():
    hidden = torch.ones(3, 5)
    assert SharedDrawDropout(RATE).eval()(hidden) is hidden
    assert SharedDrawDropout(0.0)(hidden) is hidden


class TestChunks:
    @pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
    def model(self, request):
        model = build_model(request.param)
        optimize_for_cpu(model)
        return model

    @pytest.fixture
    def calls(self, model, monkeypatch):
        """The pairs of each run of the fusion encoder, for which every pair is too large."""
        monkeypatch.setattr("bridgetower.model.cpu.BUFFER_BYTES", 1)
        sizes = []
        hook = model.fusion.register_forward_hook(
            lambda module, arguments, output: sizes.append(len(output[0]))
        )
        yield sizes
        hook.remove()

    @pytest.mark.parametrize("outputs", get_args(FusionOutputs))
    def test_they_change_nothing(self, model, calls, outputs):
        image = model.encode_image(random_images(3))
        text = model.encode_text(*random_texts([5, 3, 4]))
        whole = model.fuse(image, text, outputs)
        assert calls == [3], "with gradients: all at once"
        with torch.no_grad():
            chunked = model.fuse(image, text, outputs)
            shared = model.fuse(model.cache_image(image), model.cache_text(text), outputs)
        assert calls == [3] + 6 * [1]
        for expected, chunk, cached in zip(whole, chunked, shared, strict=True):
            for ours in (chunk, cached):
                assert (ours is None) == (expected is None)
                assert expected is None or max_difference(ours, expected) < ATOL

    @pytest.mark.parametrize(("threads", "sizes"), [(1, [1, 1, 1]), (2, [2, 1]), (3, [3])])
    def test_more_at_once_with_more_threads(self, calls, model, threads, sizes, monkeypatch):
        config = model.config
        pair = 4 * config.vision.num_tokens * config.fusion.intermediate_size  # bytes
        monkeypatch.setattr("bridgetower.model.cpu.BUFFER_BYTES", pair)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        with torch.no_grad():
            model.fuse(*random_encodings(model))
        assert calls == sizes

    def test_dropout_draws_for_all(self, model, calls):
        model.train()
        with torch.no_grad():
            model.fuse(
                model.encode_image(random_images(2)), model.encode_text(*random_texts([5, 3]))
            )
        model.eval()
        assert calls == [2]
