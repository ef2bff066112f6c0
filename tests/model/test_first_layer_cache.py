"""What a stream computes alone is computed once, and outputs="cls" computes nothing that the CLS does not need."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import ModelConfig
from bridgetower.model.fusion import Encoded
from bridgetower.model.presets import meter, meter_with_norms

pytestmark = pytest.mark.usefixtures("double_precision")

ATOL = 1e-9
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
