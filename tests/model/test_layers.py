"""Attention, feed-forward and transformer layers against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgetower.model.config import TextConfig, VisionConfig
from bridgetower.model.layers import (
    CrossAttention,
    DotProductAttention,
    FeedForward,
    Pooler,
    PostNormLayer,
    PreNormLayer,
    SelfAttention,
    activate,
)
from helpers.models import in_float64, length_mask, max_difference
from helpers.models import normal_float64 as random

WIDTH = 12
HEADS = 3
SIZES = {"hidden_size": WIDTH, "num_heads": HEADS, "intermediate_size": 20, "layer_norm_eps": 1e-3}
POST = TextConfig(dropout=0.5, **SIZES)
ATOL = 1e-10


def pre_norm(activation):
    return PreNormLayer(VisionConfig(activation=activation, **SIZES))


def attended(query, key, value, heads, mask):
    return DotProductAttention(heads, 0.0)(query, key, value, mask)


def project_in_parts(hidden, layer, count):
    pairs = zip(layer.weight.chunk(count), layer.bias.chunk(count), strict=True)
    return [F.linear(hidden, weight, bias) for weight, bias in pairs]


class TestAttention:
    def test_self_attention(self):
        layer = in_float64(SelfAttention(WIDTH, HEADS))
        hidden = random(2, 5, WIDTH)
        mask = length_mask(5, 2)
        expected = layer.out(attended(*project_in_parts(hidden, layer.qkv, 3), HEADS, mask))
        assert max_difference(layer(hidden, mask), expected) < ATOL
        assert max_difference(layer(hidden, length_mask(5, 5)), layer(hidden)) < ATOL, (
            "nothing masked is no mask"
        )

    def test_cross_attention(self):
        layer = in_float64(CrossAttention(WIDTH, HEADS))
        hidden = random(2, 3, WIDTH)
        other = random(2, 5, WIDTH, seed=1)
        mask = length_mask(4, 5)
        expected = layer.out(
            attended(layer.query(hidden), *project_in_parts(other, layer.key_value, 2), HEADS, mask)
        )
        assert (
            max_difference(layer(layer.query(hidden), layer.key_value(other), mask), expected)
            < ATOL
        )

    @settings(max_examples=25, deadline=None)
    @given(length=st.integers(1, 6), queries=st.integers(1, 6), masked=st.booleans())
    def test_first_queries_only(self, length, queries, masked):
        layer = in_float64(SelfAttention(WIDTH, HEADS))
        hidden = random(2, length, WIDTH)
        mask = length_mask(length, 1) if masked else None
        first_outputs = layer(hidden, mask, num_queries=queries)
        assert max_difference(first_outputs, layer(hidden, mask)[:, :queries]) < ATOL

    def test_masked_positions_are_not_read(self):
        layer = in_float64(SelfAttention(WIDTH, HEADS))
        hidden = random(2, 5, WIDTH)
        mask = length_mask(5, 2)
        changed = hidden + 100 * random(2, 5, WIDTH, seed=3) * ~mask[..., None]
        assert max_difference(layer(hidden, mask)[mask], layer(changed, mask)[mask]) < ATOL
        assert max_difference(layer(hidden)[mask], layer(changed)[mask]) > 0.01, (
            "without the mask they are"
        )


VALUES = torch.linspace(-6, 6, 50, dtype=torch.float64)


def test_activation_formulas():
    assert (
        max_difference(activate(VALUES, "gelu"), 0.5 * VALUES * (1 + torch.erf(VALUES / 2**0.5)))
        < 1e-12
    )
    assert (
        max_difference(activate(VALUES, "quick_gelu"), VALUES / (1 + torch.exp(-1.702 * VALUES)))
        < 1e-12
    )
    inner = (2 / torch.pi) ** 0.5 * (VALUES + 0.044715 * VALUES**3)
    assert (
        max_difference(activate(VALUES, "gelu_tanh"), 0.5 * VALUES * (1 + torch.tanh(inner)))
        < 1e-12
    )
    assert max_difference(activate(VALUES, "relu"), (VALUES + VALUES.abs()) / 2) < 1e-12


def test_feed_forward():
    layer = in_float64(FeedForward(WIDTH, 20, "quick_gelu"))
    hidden = random(2, 5, WIDTH)
    up = layer.up(hidden)
    assert max_difference(layer(hidden), layer.down(up / (1 + torch.exp(-1.702 * up)))) < ATOL


def test_pre_norm():
    layer = in_float64(pre_norm("quick_gelu"))
    hidden = random(2, 5, WIDTH)
    after = hidden + layer.attention(layer_norm(hidden, layer.attention_norm, 1e-3))
    assert (
        max_difference(layer(hidden), after + layer.mlp(layer_norm(after, layer.mlp_norm, 1e-3)))
        < ATOL
    )
    assert max_difference(layer(hidden), in_float64(pre_norm("gelu"))(hidden)) > 1e-3, (
        "the activation reaches the feed-forward"
    )
    assert torch.equal(layer(hidden), layer.train()(hidden)), "no dropout"


def test_post_norm():
    layer = in_float64(PostNormLayer(POST))
    hidden = random(2, 5, WIDTH)
    mask = length_mask(5, 3)
    after = layer_norm(hidden + layer.attention(hidden, mask), layer.attention_norm, 1e-3)
    assert (
        max_difference(
            layer(hidden, mask), layer_norm(after + layer.mlp(after), layer.mlp_norm, 1e-3)
        )
        < ATOL
    )


def layer_norm(hidden, layer, eps):
    centred = hidden - hidden.mean(dim=-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()
    return scaled * layer.weight + layer.bias


def test_pooler():
    layer = in_float64(Pooler(WIDTH))
    hidden = random(2, 5, WIDTH)
    assert max_difference(layer(hidden), torch.tanh(layer.dense(hidden[:, 0]))) < ATOL


@pytest.mark.parametrize(
    ("layer", "widths"),
    [
        (SelfAttention(WIDTH, HEADS, 0.5), [WIDTH]),
        (CrossAttention(WIDTH, HEADS, 0.5), [WIDTH, 2 * WIDTH]),
        (PostNormLayer(POST), [WIDTH]),
    ],
    ids=["self", "cross", "layer"],
)
def test_dropout_in_training_only(layer, widths):
    inputs = [random(2, 5, width, seed=seed) for seed, width in enumerate(widths)]
    layer = in_float64(layer)
    inputs += [None] * isinstance(layer, CrossAttention)
    assert torch.equal(layer(*inputs), layer(*inputs))
    layer.train()
    assert max_difference(layer(*inputs), layer(*inputs)) > 0.01
