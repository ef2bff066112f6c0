"""Encodings: chosen, repeated, joined and padded without a change; rows of layers are copied where they are read."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from bridgetower.model.bridges import BRIDGES
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.fusion import Encoded, TakenLayers

pytestmark = pytest.mark.usefixtures("double_precision")

ATOL = 1e-9
ROWS = torch.tensor([0, 1, 2, 2, 0, 1, 0, 1, 2])
OTHERS = torch.tensor([0, 1, 2, 0, 1, 2, 1, 2, 0])
LENGTHS = st.lists(st.integers(1, 8), min_size=1, max_size=4)


@cache
def built() -> BridgeTower:
    return tiny.build()


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
    model, pixels, (ids, mask) = built(), tiny.images(3), tiny.texts([5, 3, 4])
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
    model = built()
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


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that operators made and that are still there, and the most that there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def copied(encoded: Encoded, rows: Tensor) -> Encoded:
    """Every layer copied before any is read."""
    return replace(encoded.map(lambda tensor: tensor[rows]), first_layer_cache=None)


@pytest.mark.parametrize("kind", BRIDGES)
@pytest.mark.parametrize("cached", [False, True])
def test_numbers_and_gradients_are_those_of_copies(kind: str, cached: bool) -> None:
    found = {}
    for name, take in (("copied", copied), ("taken", Encoded.__getitem__)):
        model = tiny.build(tiny.changed(fusion__bridge=kind))
        image, text = tiny.encodings(model)
        if cached and name == "taken":
            image, text = model.cache_image(image), model.cache_text(text)
        fused = model.fuse(take(image, ROWS), take(text, OTHERS), outputs="all")
        outputs = {"text": fused.text, "image": fused.image, "pooled": fused.pooled}
        weights = tiny.cotangents(outputs)
        sum((outputs[each] * weights[each]).sum() for each in outputs).backward()
        gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
        found[name] = outputs, gradients
    (one, one_gradients), (other, other_gradients) = found.values()
    assert all(tiny.off(one[name], other[name]) <= (1e-5 if cached else 0) for name in one)
    assert one_gradients.keys() == other_gradients.keys()
    assert all(tiny.off(one_gradients[name], other_gradients[name]) < 1e-4 for name in one_gradients)


def test_rows_of_rows() -> None:
    image, text = tiny.encodings(tiny.build())
    again = text[ROWS][torch.tensor([8, 3, 3])][slice(1, None)]
    assert isinstance(again.layers, TakenLayers)
    assert not isinstance(again.layers.layers, TakenLayers)
    expected = copied(copied(text, ROWS), torch.tensor([3, 3]))
    assert all(torch.equal(one, other) for one, other in zip(again.layers, expected.layers, strict=True))
    assert torch.equal(again.mask, expected.mask)
    assert len(again.layers[1:]) == len(text.layers) - 1
    assert torch.equal(again.layers[-1:][0], expected.layers[-1])
    joined = Encoded.cat([image[ROWS], image])
    assert torch.equal(joined.layers[0], torch.cat([image.layers[0][ROWS], image.layers[0]]))


@pytest.mark.parametrize("train", [False, True])
def test_less_memory(train: bool) -> None:
    """Six fusion layers read six tower layers of each modality, one after the other."""
    config = tiny.changed(
        **{"vision__num_layers": 6, "text__num_layers": 6, "fusion__num_layers": 6, "fusion__hidden_size": 64},
        **{"vision__image_size": 64, "fusion__dropout": 0.0},
    )
    model = tiny.build(config).train(train)
    with torch.set_grad_enabled(train):
        image, text = tiny.encodings(model)
        rows = ROWS.repeat(2)
        takes: dict[str, Callable[[Encoded, Tensor], Encoded]] = {"copied": copied, "taken": Encoded.__getitem__}
        most = {}
        for name, take in takes.items():
            with LiveBytes() as live:
                model.fuse(take(image, rows), take(text, rows)).pooled.sum()
            most[name] = live.most
        layer = image.layers[0][rows].nbytes
    assert most["copied"] > 6 * layer
    assert most["copied"] - most["taken"] > 4 * layer  # of the six layers of images, all but the one that is read
