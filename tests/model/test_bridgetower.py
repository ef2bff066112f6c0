"""The whole model: encodings can be cut, joined, repeated and fused in any order without a change."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor, nn

import tiny
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.fusion import Fused
from bridgetower.model.presets import meter

pytestmark = pytest.mark.usefixtures("double_precision")

ATOL = 1e-9
LENGTHS = st.lists(st.integers(1, 8), min_size=1, max_size=4)
VARIANTS = {
    "bridges": tiny.CONFIG,
    "meter": meter(tiny.CONFIG),
    "scaled": tiny.changed(fusion__bridge="scaled_add"),
    "interpolated": tiny.changed(fusion__bridge="interpolate", fusion__separate_projections=True),
    "bert and timm": tiny.changed(
        text__positions="bert", vision__activation="gelu", vision__pre_norm=False, vision__patch_bias=True
    ),
    "gated": tiny.changed(fusion__bridge="gated"),
    "static manager": tiny.changed(
        fusion__bridge="static_manager", fusion__vision_layers=(2, 3, 4), fusion__text_layers=(2,)
    ),
    "adaptive manager": tiny.changed(fusion__bridge="adaptive_manager", fusion__layer_embeddings=True),
    "three layers": tiny.changed(fusion__num_layers=3),
    "one layer": tiny.changed(fusion__num_layers=1),
    "chosen layers": tiny.changed(fusion__vision_layers=(1, 4), fusion__text_layers=(1, 3)),
}


@cache
def built(name: str = "bridges") -> BridgeTower:
    return tiny.build(VARIANTS[name])


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> BridgeTower:
    return built(request.param)


def close(one: Fused, other: Fused) -> bool:
    return all(tiny.off(getattr(one, name), getattr(other, name)) < ATOL for name in ("text", "image", "pooled"))


class TestComposition:
    def test_forward_is_encode_and_fuse(self, model: BridgeTower) -> None:
        image, text = tiny.encodings(model)
        fused, whole = model.fuse(image, text, "all"), model(tiny.images(3), *tiny.texts([5, 3, 4]))
        assert all(torch.equal(getattr(fused, name), getattr(whole, name)) for name in ("text", "image", "pooled"))

    def test_pooled_is_text_then_image(self, model: BridgeTower) -> None:
        fused = model.fuse(*tiny.encodings(model), "all")
        expected = [model.text_pooler(fused.text), model.image_pooler(fused.image)]
        assert torch.equal(fused.pooled, torch.cat(expected, dim=-1))

    def test_encodings(self, model: BridgeTower) -> None:
        """Projected tower layers with their token type and their own vector; the CLS is the tower's own."""

        def vector(embedding: nn.Embedding | None, layer: int) -> Tensor | float:
            return 0.0 if embedding is None else embedding.weight[layer - 1]

        config, pixels, (ids, mask) = model.config, tiny.images(2), tiny.texts([5, 3])
        image, text = model.encode_image(pixels), model.encode_text(ids, mask)
        states = model.vision(pixels, config.vision_layers), model.text(ids, mask.bool(), config.text_layers)
        for encoded, hidden, kind, layers, projections, embedding in (
            (image, states[0], 1, config.vision_layers, model.image_projections, model.image_layer_embedding),
            (text, states[1], 0, config.text_layers, model.text_projections, model.text_layer_embedding),
        ):
            for index, layer in enumerate(encoded.layers):
                expected = projections[index if config.fusion.separate_projections else 0](hidden[index])
                expected = expected + model.token_type_embedding.weight[kind] + vector(embedding, layers[index])
                assert tiny.off(layer, expected) < ATOL
            assert torch.equal(encoded.cls, hidden[-1][:, 0])
            assert len(encoded.layers) == len(layers)
        assert image.mask is None
        assert torch.equal(text.mask, mask.bool())


class TestBatches:
    @settings(max_examples=15, deadline=None)
    @given(lengths=LENGTHS, more=st.integers(0, 6), name=st.sampled_from(list(VARIANTS)))
    def test_padding_changes_nothing(self, lengths: list[int], more: int, name: str) -> None:
        model = built(name)
        pixels, (ids, mask) = tiny.images(len(lengths)), tiny.texts(lengths)
        wider = tiny.texts(lengths, width=max(lengths) + more)
        one, other = model(pixels, ids, mask), model(pixels, *wider)
        assert tiny.off(one.pooled, other.pooled) < ATOL
        assert tiny.off(one.image, other.image) < ATOL
        assert tiny.off(one.text[mask.bool()], other.text[wider[1].bool()]) < ATOL

    def test_masks(self, model: BridgeTower) -> None:
        """Padding without one is read; none is as good as a full one."""
        pixels, (ids, mask), full = tiny.images(2), tiny.texts([5, 3]), tiny.texts([5, 5])
        assert tiny.off(model(pixels, ids, mask).pooled, model(pixels, ids).pooled) > 1e-3
        assert close(model(pixels, *full), model(pixels, full[0]))
        assert torch.equal(model.encode_text(ids, mask).cls, model.encode_text(ids, mask.bool()).cls)

    @settings(max_examples=15, deadline=None)
    @given(order=st.permutations(range(4)), cut=st.integers(1, 3), name=st.sampled_from(list(VARIANTS)))
    def test_order_and_batching_change_nothing(self, order: list[int], cut: int, name: str) -> None:
        model = built(name)
        pixels, (ids, mask) = tiny.images(4), tiny.texts([5, 3, 4, 1])
        whole = model(pixels, ids, mask)
        for rows in (order[:cut], order[cut:]):
            part = Fused(whole.text[rows], whole.image[rows], whole.pooled[rows])
            assert close(model(pixels[rows], ids[rows], mask[rows]), part)


def gradients(model: BridgeTower, outputs: Any, loss: Callable[[Fused], Tensor]) -> dict[str, Tensor]:
    """Gradients of all parameters and of both encodings; what is not reached has gradient 0."""
    pixels = tiny.images(3).requires_grad_()
    image, text = model.encode_image(pixels), model.encode_text(*tiny.texts([5, 3, 4]))
    leaves = {**dict(model.named_parameters()), "pixel_values": pixels}
    leaves |= {f"image layer {number}": layer for number, layer in enumerate(image.layers)}
    leaves |= {f"text layer {number}": layer for number, layer in enumerate(text.layers)}
    found = torch.autograd.grad(loss(model.fuse(image, text, outputs)), list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


class TestReading:
    @pytest.mark.parametrize("outputs", ["pooled", "text"])
    def test_gradients(self, model: BridgeTower, outputs: Any) -> None:
        shape = {"pooled": (3, 32), "text": (3, 5, 16)}[outputs]
        weights = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        some, everything = (
            gradients(model, chosen, lambda fused: (getattr(fused, outputs) * weights).sum())
            for chosen in (outputs, "all")
        )
        assert some.keys() == everything.keys()
        assert [name for name in some if tiny.off(some[name], everything[name]) > ATOL] == []
        assert some["pixel_values"].abs().max() > 1e-6

    def test_control_other_reads_have_other_gradients(self) -> None:
        model = tiny.build()
        pooled = gradients(model, "all", lambda fused: fused.pooled.sum())
        text = gradients(model, "all", lambda fused: fused.text.sum())
        assert max(tiny.off(pooled[name], text[name]) for name in pooled) > 0.1

    @pytest.mark.parametrize(
        ("outputs", "missing"), [("pooled", ["text", "image"]), ("text", ["image", "pooled"]), ("all", [])]
    )
    def test_what_was_not_read_is_an_error(self, outputs: Any, missing: list[str]) -> None:
        fused = tiny.build().fuse(*tiny.encodings(tiny.build()), outputs)
        for name in ("text", "image", "pooled"):
            if name in missing:
                with pytest.raises(ValueError, match=f"{name} was not computed; call fuse with outputs="):
                    getattr(fused, name)
            else:
                assert getattr(fused, name).shape[0] == 3

    def test_a_name_that_is_not_there(self) -> None:
        fuse, model = inspect.unwrap(BridgeTower.fuse), tiny.build()  # without the annotations' own check
        with pytest.raises(ValueError, match="outputs is 'typo'; expected one of pooled, text, all"):
            fuse(model, *tiny.encodings(model), outputs="typo")


class TestTokenTypes:
    def test_second_image(self) -> None:
        model = tiny.build(tiny.changed(fusion__num_token_types=3))
        first, second = (model.encode_image(tiny.images(2), token_type=number) for number in (1, 2))
        types = model.token_type_embedding.weight
        for one, other in zip(first.layers, second.layers, strict=True):
            assert tiny.off(other - one, (types[2] - types[1]).expand_as(one)) < ATOL
        assert torch.equal(first.cls, second.cls)

    def test_a_type_that_is_not_there(self) -> None:
        for kind in (2, -1):
            with pytest.raises(ValueError, match=rf"token type {kind}; this model has 2: set fusion\.num_token_types"):
                tiny.build().encode_image(tiny.images(1), token_type=kind)


class TestErrors:
    def test_unequal_numbers(self) -> None:
        image, text = tiny.encodings(tiny.build())
        with pytest.raises(ValueError, match="1 images and 2 texts; expected one text per image: index them first"):
            tiny.build().fuse(image[:1], text[:2])

    def test_annotations_are_checked_in_these_tests(self) -> None:
        """Else none of the shapes above would be."""
        ids, mask = tiny.texts([5, 3])
        with pytest.raises(TypeCheckError):
            tiny.build().encode_text(ids, mask[:, :4])
        with pytest.raises(TypeCheckError):
            tiny.build().encode_image(tiny.images(2)[0])


class TestModes:
    def test_dropout_in_training_only(self) -> None:
        model = tiny.build()
        assert torch.equal(model.fuse(*tiny.encodings(model)).pooled, model.fuse(*tiny.encodings(model)).pooled)
        image = model.encode_image(tiny.images(3))
        model.train()
        assert tiny.off(model.fuse(*tiny.encodings(model)).pooled, model.fuse(*tiny.encodings(model)).pooled) > 1e-3
        assert torch.equal(model.encode_image(tiny.images(3)).cls, image.cls), "the image tower has none"

    def test_every_parameter_learns(self) -> None:
        model = tiny.build()
        image, text = tiny.encodings(model)
        fused = model.fuse(image, text, "all")
        outputs = [fused.text.sum(), fused.image.sum(), model.mlm_logits(fused.text).sum()]
        outputs += [model.itm_logits(fused.pooled).sum(), model.head("itc").logit_scale()]
        outputs += [model.image_embeds(image).sum(), model.text_embeds(text).sum()]
        torch.stack(outputs).sum().backward()
        assert [name for name, value in model.named_parameters() if value.grad is None] == []

    def test_half_precision(self) -> None:
        model = tiny.build().to(torch.bfloat16)
        fused = model(tiny.images(2).to(torch.bfloat16), *tiny.texts([5, 3]))
        assert fused.pooled.dtype == torch.bfloat16
        assert tiny.off(fused.pooled.double(), tiny.build()(tiny.images(2), *tiny.texts([5, 3])).pooled) < 0.15
