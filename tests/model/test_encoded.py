"""Encodings: chosen, repeated, joined and padded without a change; what a stream computes alone is computed once."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from bridgetower.model.bridges import BRIDGES
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import ModelConfig
from bridgetower.model.fusion import Encoded, TakenLayers
from bridgetower.model.presets import meter, meter_with_norms

pytestmark = pytest.mark.usefixtures("double_precision")

ATOL = 1e-9
ROWS = torch.tensor([0, 1, 2, 2, 0, 1, 0, 1, 2])
OTHERS = torch.tensor([0, 1, 2, 0, 1, 2, 1, 2, 0])
LENGTHS = st.lists(st.integers(1, 8), min_size=1, max_size=4)


VARIANTS = {
    "bridges": tiny.CONFIG,
    "meter": meter(tiny.CONFIG),
    "norms": meter_with_norms(tiny.CONFIG),
    "distilled": tiny.changed(vision__distillation_token=True),
    "one layer": tiny.changed(fusion__num_layers=1),
    "three layers": tiny.changed(fusion__num_layers=3),
}
OUTPUTS = {"pooled": "pooled", "text": "text", "all": "image"}


def cached(model: BridgeTower, image: Encoded, text: Encoded) -> tuple[Encoded, Encoded]:
    return model.cache_image(image), model.cache_text(text)


def gradients(output: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a weighed sum; what is not reached has gradient 0."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((output * weights).sum(), list(parameters.values()), allow_unused=True)
    return {name: torch.zeros(()) if one is None else one for name, one in zip(parameters, found, strict=True)}


@cache
def built(name: str = "bridges") -> BridgeTower:
    return tiny.build(VARIANTS[name])


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


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> BridgeTower:
    return built(request.param)


class TestFirstLayerCache:
    @settings(max_examples=15, deadline=None)
    @given(
        pairs=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=6),
        name=st.sampled_from(list(VARIANTS)),
        outputs=st.sampled_from(list(OUTPUTS)),
    )
    def test_pairs_that_share_caches(self, pairs: list[tuple[int, int]], name: str, outputs: Any) -> None:
        model = built(name)
        image, text = model.encode_image(tiny.images(3)), model.encode_text(*tiny.texts([5, 3, 4, 1]))
        rows, columns = torch.tensor(pairs).T
        plain = model.fuse(image[rows], text[columns], outputs)
        image, text = cached(model, image, text)
        shared = model.fuse(image[rows], text[columns], outputs)
        assert tiny.off(getattr(plain, OUTPUTS[outputs]), getattr(shared, OUTPUTS[outputs])) < ATOL

    @pytest.mark.parametrize("outputs", OUTPUTS)
    def test_gradients(self, model: BridgeTower, outputs: Any) -> None:
        rows, columns = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 2, 0])

        outcomes = []
        for encoded in (tiny.encodings(model), cached(model, *tiny.encodings(model))):
            output = getattr(model.fuse(encoded[0][rows], encoded[1][columns], outputs), OUTPUTS[outputs])
            outcomes.append(gradients(output, dict(model.named_parameters())))
        plain, shared = outcomes
        assert [name for name in plain if tiny.off(plain[name], shared[name]) > ATOL] == []
        assert max(float(gradient.abs().max()) for gradient in plain.values()) > 1e-3

    def test_the_first_self_attention_runs_once_per_item(self) -> None:
        model, counts = tiny.build(), []
        for layers in (model.fusion.image_layers, model.fusion.text_layers):
            layers[0].self_attention.register_forward_hook(lambda _, inputs, __: counts.append(len(inputs[0])))
        image, text = cached(model, *tiny.encodings(model))
        rows = torch.tensor([0, 1, 2, 0, 1, 2])
        model.fuse(image[rows], text[rows.flip(0)])
        assert counts == [3, 3]

    def test_one_cache_is_enough(self, model: BridgeTower) -> None:
        image, text = tiny.encodings(model)
        expected = model.fuse(image, text).pooled
        assert tiny.off(model.fuse(model.cache_image(image), text).pooled, expected) < ATOL
        assert tiny.off(model.fuse(image, model.cache_text(text)).pooled, expected) < ATOL

    def test_padding_and_joining_keep_it(self, model: BridgeTower) -> None:
        image, text = tiny.encodings(model)
        parts = [model.cache_text(model.encode_text(*tiny.texts([5, 3, 4]))[rows]) for rows in (slice(1), slice(1, 3))]
        joined = Encoded.cat([parts[0], parts[1].padded(8)])
        assert joined.first_layer_cache is not None
        assert joined.first_layer_cache.query.shape[:2] == (3, 8)
        assert tiny.off(model.fuse(image, joined).pooled, model.fuse(image, text).pooled) < ATOL

    def test_a_part_without_cache_takes_it_from_all(self) -> None:
        text = tiny.encodings(tiny.build())[1]
        assert Encoded.cat([tiny.build().cache_text(text), text]).first_layer_cache is None

    def test_control_another_items_cache(self, model: BridgeTower) -> None:
        image, text = tiny.encodings(model)
        wrong = model.cache_image(image).map(lambda tensor: tensor.flip(0))
        mixed = Encoded(image.layers, image.cls, first_layer_cache=wrong.first_layer_cache)
        assert tiny.off(model.fuse(mixed, text).pooled, model.fuse(image, text).pooled) > 1e-3

    @pytest.mark.parametrize("bridge", ["add", "static_manager"])
    def test_draws_of_every_pair_are_apart(self, bridge: str) -> None:
        """Of dropout, and of the noise of managers."""
        for dropout in (0.0, 0.2):
            model = tiny.build(tiny.changed(fusion__dropout=dropout, fusion__bridge=bridge)).train()
            draws = dropout > 0 or bridge == "static_manager"
            for encoded in cached(model, *tiny.encodings(model)):
                assert (encoded.first_layer_cache is None) == draws
            for encoded in cached(model.eval(), *tiny.encodings(model)):
                assert encoded.first_layer_cache is not None


class TestCls:
    @pytest.mark.parametrize(
        "config",
        [
            tiny.CONFIG,
            tiny.changed(heads__itc="fused"),
            tiny.changed(fusion__separate_projections=True, heads__itc="fused"),
            tiny.changed(text__positions="bert", vision__activation="gelu", vision__pre_norm=False),
        ],
        ids=["tower", "fused", "separate", "bert_and_timm"],
    )
    def test_embeddings_and_gradients(self, config: ModelConfig) -> None:
        model, pixels, words = tiny.build(config), tiny.images(3), tiny.texts([5, 3, 4])
        results = []
        for outputs in ("layers", "cls"):
            image, text = model.encode_image(pixels, outputs=outputs), model.encode_text(*words, outputs=outputs)
            embeds = torch.cat([model.image_embeds(image), model.text_embeds(text)])
            reached = {n: p for n, p in model.named_parameters() if n.startswith(("vision.", "text.", "itc_head."))}
            results.append((embeds, gradients(embeds, reached)))
        (all_embeds, all_found), (cls_embeds, cls_found) = results
        assert tiny.off(all_embeds, cls_embeds) < ATOL
        assert [name for name in all_found if tiny.off(all_found[name], cls_found[name]) > ATOL] == []

    def test_the_last_layer_runs_at_the_cls_only(self) -> None:
        model, lengths = tiny.build(), []

        def count(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
            lengths.append(inputs[0].shape[1])

        for tower in (model.vision, model.text):
            for layer in tower.layers[-2:]:
                layer.mlp.register_forward_hook(count)
        model.encode_image(tiny.images(2), outputs="cls")
        model.encode_text(*tiny.texts([5, 3]), outputs="cls")
        assert lengths == [10, 1, 5, 1]

    def test_cannot_be_fused(self) -> None:
        model = tiny.build()
        image, text = model.encode_image(tiny.images(3), outputs="cls"), tiny.encodings(model)[1]
        with pytest.raises(ValueError, match='hold the CLS only; encode with outputs="layers"'):
            model.fuse(image, text)
