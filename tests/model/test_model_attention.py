"""Attention that is written out against its formula, and against PyTorch's, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from bridgetower.model.attention import attend
from bridgetower.model.dropout import draw_kept

WIDTH, HEADS = 12, 3
ATOL = 1e-10
LARGE = 700  # positions whose scores of one head are a block of their own


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask_of(*lengths: int) -> Tensor:
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def streams(samples: int, queries: int, keys: int) -> list[Tensor]:
    """Query, key and value as the layers make them: parts of wider tensors."""
    query = random(samples, queries, WIDTH)
    key, value = random(samples, keys, 2 * WIDTH, seed=1).chunk(2, dim=-1)
    return [tensor.detach().requires_grad_() for tensor in (query, key, value)]


def by_hand(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Softmax attention, head by head and sample by sample."""
    size = query.shape[-1] // heads
    rows = []
    for sample in range(len(query)):
        parts = []
        for head in range(heads):
            columns = slice(head * size, (head + 1) * size)
            kept = slice(None) if mask is None else mask[sample]
            keys, values = key[sample, kept, columns], value[sample, kept, columns]
            parts.append((query[sample, :, columns] @ keys.T / size**0.5).softmax(dim=-1) @ values)
        rows.append(torch.cat(parts, dim=-1))
    return torch.stack(rows)


def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's attention."""
    split = [tensor.unflatten(-1, (HEADS, -1)).transpose(1, 2) for tensor in (query, key, value)]
    hidden = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(*split, attn_mask=hidden).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("mask", [None, mask_of(5, 3)], ids=["everything", "masked"])
def test_formula(mask: Tensor | None) -> None:
    query, key, value = streams(2, 4, 5)
    ours = attend(query, key, value, num_heads=HEADS, mask=mask, dropout=0.0)
    assert tiny.off(ours, by_hand(query, key, value, HEADS, mask)) < ATOL


def test_control_heads_matter() -> None:
    query, key, value = streams(2, 4, 5)
    ours = attend(query, key, value, num_heads=HEADS, mask=None, dropout=0.0)
    assert tiny.off(ours, by_hand(query, key, value, 2, None)) > 0.01


@pytest.mark.parametrize(
    ("samples", "queries", "keys", "mask"),
    [(2, 4, 5, None), (2, 4, 5, mask_of(5, 3)), (3, 1, 6, mask_of(1, 6, 2)), (2, LARGE, LARGE, mask_of(LARGE, 400))],
    ids=["everything", "masked", "one query", "several blocks"],
)
def test_values_and_gradients_are_those_of_pytorch(samples: int, queries: int, keys: int, mask: Tensor | None) -> None:
    leaves = streams(samples, queries, keys)
    ours, theirs = attend(*leaves, num_heads=HEADS, mask=mask, dropout=0.0), fused(*leaves, mask)
    assert tiny.off(ours, theirs) < ATOL
    cotangent = random(*ours.shape, seed=5)
    expected = torch.autograd.grad(theirs, leaves, cotangent)
    for one, other in zip(torch.autograd.grad(ours, leaves, cotangent), expected, strict=True):
        assert tiny.off(one, other) < ATOL


@pytest.mark.parametrize("keys", [5, LARGE])
def test_dropout_of_weights(keys: int) -> None:
    leaves, rate = streams(2, keys, keys), 0.4
    torch.manual_seed(0)
    ours = attend(*leaves, num_heads=HEADS, mask=None, dropout=rate)
    torch.manual_seed(0)
    kept = draw_kept((2, HEADS, keys, keys), rate)
    query, key, value = (tensor.unflatten(-1, (HEADS, -1)).transpose(1, 2) for tensor in leaves)
    weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1) * kept / (1 - rate)
    theirs = (weights @ value).transpose(1, 2).flatten(2)
    assert tiny.off(ours, theirs) < ATOL
    cotangent = random(*ours.shape, seed=5)
    expected = torch.autograd.grad(theirs, leaves, cotangent)
    for one, other in zip(torch.autograd.grad(ours, leaves, cotangent), expected, strict=True):
        assert tiny.off(one, other) < ATOL


def test_bfloat16_is_as_near_to_float32_as_pytorch_is() -> None:
    leaves = [tensor.bfloat16() for tensor in streams(2, 40, 40)]
    exact = fused(*(tensor.double() for tensor in leaves), None)
    ours = attend(*leaves, num_heads=HEADS, mask=None, dropout=0.0)
    assert ours.dtype == torch.bfloat16
    assert tiny.off(ours.double(), exact) < 3 * tiny.off(fused(*leaves, None).double(), exact)


def test_graphs_hold_the_fused_attention() -> None:
    class Attention(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attend(query, key, value, num_heads=HEADS, mask=None, dropout=0.0)

    graph = torch.export.export(Attention(), tuple(tensor.detach() for tensor in streams(2, 4, 5))).graph
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert "aten.scaled_dot_product_attention.default" in targets
