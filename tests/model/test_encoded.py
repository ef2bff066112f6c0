"""Encodings: chosen, repeated, joined and padded without a change."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.fusion import Encoded

pytestmark = pytest.mark.usefixtures("double_precision")

ATOL = 1e-9
LENGTHS = st.lists(st.integers(1, 8), min_size=1, max_size=4)


def same(one: Encoded, other: Encoded) -> bool:
    """Equal up to rounding, where the texts are not padding."""
    kept = torch.ones(one.layers[0].shape[:2], dtype=torch.bool) if one.mask is None else one.mask
    layers = all(tiny.off(a[kept], b[kept]) < ATOL for a, b in zip(one.layers, other.layers, strict=True))
    return layers and tiny.off(one.cls, other.cls) < ATOL


def close_pairs(model: BridgeTower, pixels: Tensor, one: Encoded, other: Encoded) -> bool:
    image = model.encode_image(pixels)
    pooled = [model.fuse(image, text).pooled for text in (one, other)]
    return tiny.off(*pooled) < ATOL


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_indexing_with_repeats_is_encoding_repeats(rows: list[int]) -> None:
    model, pixels, (ids, mask) = tiny.build(), tiny.images(3), tiny.texts([5, 3, 4])
    index = torch.tensor(rows)
    assert same(model.encode_image(pixels)[index], model.encode_image(pixels[index]))
    assert same(model.encode_text(ids, mask)[index], model.encode_text(ids[index], mask[index]))
    pairs = model.fuse(model.encode_image(pixels)[index], model.encode_text(ids, mask)[index.flip(0)])
    expected = model(pixels[index], ids[index.flip(0)], mask[index.flip(0)])
    assert tiny.off(pairs.pooled, expected.pooled) < ATOL


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (torch.tensor([2, 0]), [2, 0]),
        (torch.tensor([True, False, True]), [0, 2]),
        (slice(1, None), [1, 2]),
        (torch.tensor([], dtype=torch.long), []),
    ],
    ids=["numbers", "choice", "slice", "nothing"],
)
def test_kinds_of_index(index: Any, rows: list[int]) -> None:
    for encoded in tiny.encodings(tiny.build()):
        chosen = encoded[index]
        assert len(chosen) == len(rows)
        assert torch.equal(chosen.cls, encoded.cls[rows])
        assert all(torch.equal(one, many[rows]) for one, many in zip(chosen.layers, encoded.layers, strict=True))
        assert (chosen.mask is None) == (encoded.mask is None)


def test_gradients_of_repeats_add_up() -> None:
    image, _ = tiny.encodings(tiny.build())
    image = image.map(lambda tensor: tensor.detach().requires_grad_())
    image[torch.tensor([0, 0, 2])].cls.sum().backward()
    assert image.cls.grad[:, 0].tolist() == [2, 0, 1]


@settings(max_examples=15, deadline=None)
@given(parts=st.lists(LENGTHS, min_size=1, max_size=3), masked=st.booleans())
def test_cat_of_different_lengths(parts: list[list[int]], masked: bool) -> None:
    """With unequal texts in a part a mask is needed; without one each part has one length."""
    model = tiny.build()
    if not masked:
        parts = [[part[0]] * len(part) for part in parts]
    lengths = [length for part in parts for length in part]
    whole = model.encode_text(*tiny.texts(lengths))
    ids, mask = tiny.texts(lengths)
    pieces, start = [], 0
    for part in parts:
        rows, width = slice(start, start + len(part)), max(part)
        pieces.append(model.encode_text(ids[rows, :width], mask[rows, :width] if masked else None))
        start += len(part)
    joined = Encoded.cat(pieces)
    assert len(joined) == len(lengths)
    assert same(whole, joined)
    assert (joined.mask is None) == (not masked and len(set(lengths)) == 1)
    assert joined.mask is None or torch.equal(joined.mask, mask.bool())
    pixels = tiny.images(len(lengths))
    assert close_pairs(model, pixels, joined, whole)


def test_cat_of_images_or_nothing() -> None:
    model, pixels = tiny.build(), tiny.images(4)
    joined = Encoded.cat([model.encode_image(pixels[:1]), model.encode_image(pixels[1:])])
    assert joined.mask is None
    assert same(joined, model.encode_image(pixels))
    with pytest.raises(ValueError, match="no encodings given; expected at least one"):
        Encoded.cat([])


def test_padded() -> None:
    _, text = tiny.encodings(tiny.build())
    longer = text.padded(9)
    assert longer.mask.sum(dim=1).tolist() == [5, 3, 4]
    assert all(layer.shape[1] == 9 for layer in longer.layers)
    without = Encoded(text.layers, text.cls).padded(6)
    assert without.mask.tolist() == [[True] * 5 + [False]] * 3
    assert same(text.padded(5), text)
    with pytest.raises(ValueError, match="5 tokens do not fit into 4"):
        text.padded(4)


def test_map() -> None:
    _, text = tiny.encodings(tiny.build())
    assert text.layers[0].requires_grad
    detached = text.map(Tensor.detach)
    assert not any(tensor.requires_grad for tensor in (*detached.layers, detached.cls))
    assert torch.equal(detached.mask, text.mask)
