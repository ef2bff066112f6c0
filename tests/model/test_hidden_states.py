"""Hidden states and attention weights of chosen layers: what the layers get and give, and nothing stays behind."""

from threading import Thread, current_thread, main_thread

import pytest
import torch

from bridgetower import BridgeTower, hidden_states, load
from bridgetower.model.cpu import optimize_for_cpu, pack_weights
from helpers.custom_modules import CUSTOM_EXTENSIONS
from helpers.models import (
    SMALL_CONFIG,
    build_model,
    changed_config,
    max_difference,
    off_defaults,
    random_encodings,
    random_images,
    random_texts,
)

ATOL = 1e-5
CONFIG = changed_config(fusion__num_layers=3, fusion__num_heads=4)
LENGTHS = (5, 3, 4)


def image_and_text():
    return random_images(3), *random_texts(LENGTHS)


@torch.no_grad()
def found(model, **options):
    return hidden_states(model, *image_and_text(), **options)


@pytest.mark.parametrize("optimize", [lambda model: None, optimize_for_cpu, pack_weights])
def test_everything(optimize):
    model = build_model(CONFIG)
    optimize(model)
    states = found(model, attentions=True)
    layers_of = [
        list(layers)
        for layers in (states.vision, states.text, states.fused_image, states.fused_text)
    ]
    assert layers_of == [[0, 1, 2, 3, 4], [0, 1, 2, 3], [1, 2, 3], [1, 2, 3]]
    shapes = {
        kind: {n: tuple(weights.shape) for n, weights in attention.items()}
        for kind, attention in states.attentions.items()
    }
    assert shapes == {
        "vision": dict.fromkeys(range(1, 5), (3, 3, 10, 10)),
        "text": dict.fromkeys(range(1, 4), (3, 4, 5, 5)),
        "image self": dict.fromkeys(range(1, 4), (3, 4, 10, 10)),
        "text self": dict.fromkeys(range(1, 4), (3, 4, 5, 5)),
        "image to text": dict.fromkeys(range(1, 4), (3, 4, 10, 5)),
        "text to image": dict.fromkeys(range(1, 4), (3, 4, 5, 10)),
    }
    for kind, layers in states.attentions.items():
        for weights in layers.values():
            assert torch.allclose(weights.sum(dim=-1), torch.ones(()), atol=1e-6)
            if kind in ("text", "text self", "image to text"):
                assert float(weights[1, ..., 3:].max()) == 0.0, "padding gets none"
    assert not [
        module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks
    ]
    pixels, ids, mask = image_and_text()
    with torch.no_grad():
        fused = model(pixels, ids, mask)
        vision = model.vision(pixels, (2, 3, 4))
        text = model.text(ids, mask.bool(), (1, 2, 3))
        ours = [model.vision.post_norm(states.vision[number]) for number in (2, 3, 4)]
    ours += [
        *(states.text[number] for number in (1, 2, 3)),
        states.fused_text[3],
        states.fused_image[3],
        states.pooled,
    ]
    usual = [*vision, *text, fused.text, fused.image, fused.pooled]
    assert max(map(max_difference, ours, usual)) < ATOL


@torch.no_grad()
def test_weights_are_those_that_the_layers_use():
    """Weights times values are what each output projection gets."""
    model = build_model(CONFIG)
    seen = []

    def keep(attention, inputs, output):
        seen.append((attention.split_heads(inputs[2]), attention.split_heads(output)))

    for layer in model.fusion.text_layers:
        layer.cross_attention.attention.register_forward_hook(keep)
    weights = torch.stack(list(found(model, attentions=True).attentions["text to image"].values()))
    assert weights.shape == (3, 3, 4, 5, 10)

    def off(weights):
        return max(
            max_difference(layer @ value, context)
            for layer, (value, context) in zip(weights, seen, strict=True)
        )

    assert off(weights) < 1e-5
    assert off(weights.flip(2)) > 1e-3  # the control: heads in another order
    assert off(weights.flip(0)) > 1e-3  # and layers


def test_chosen_layers_only():
    states = found(build_model(CONFIG), layers={"vision": [4, 0], "fusion": (2,)}, attentions=True)
    found_layers = [
        list(layers)
        for layers in (states.vision, states.text, states.fused_image, states.fused_text)
    ]
    assert found_layers == [[4, 0], [], [2], [2]]
    assert {kind: list(layers) for kind, layers in states.attentions.items()} == {
        "vision": [4],
        **{key: [2] for key in ("image self", "text self", "image to text", "text to image")},
    }
    assert found(build_model(CONFIG), layers={"text": [1]}).attentions == {}


def test_layers_above_those_that_are_bridged():
    model = build_model(changed_config(fusion__vision_layers=(1, 2), fusion__text_layers=(1, 2)))
    states = found(model)
    assert list(states.vision) == [0, 1, 2, 3, 4]
    with torch.no_grad():
        assert max_difference(states.pooled, model(*image_and_text()).pooled) < ATOL
        assert (
            max_difference(
                model.vision.post_norm(states.vision[4]), model.vision(image_and_text()[0], (4,))[0]
            )
            < ATOL
        )


def test_layers_that_are_not_there():
    available = "this model has vision 0 to 4, text 0 to 3, fus"
    with pytest.raises(ValueError, match=f"layers has vision 5, fusion 0; {available}"):
        found(build_model(CONFIG), layers={"vision": [5], "fusion": [0]})


def test_custom_towers():
    values = {
        "vision.architecture": "patches",
        "vision.prefix_tokens": 0,
        "text.architecture": "words",
    }
    model = off_defaults(BridgeTower(SMALL_CONFIG.override(values), CUSTOM_EXTENSIONS)).eval()
    states = found(model)
    with torch.no_grad():
        assert max_difference(states.vision[4], model.vision(image_and_text()[0], (4,))[0]) < ATOL
        assert max_difference(states.pooled, model(*image_and_text()).pooled) < ATOL
    assert list(states.vision) == [1, 2, 3, 4]
    with pytest.raises(
        ValueError, match="the attention of Patches cannot be kept; leave vision out of layers"
    ):
        found(model, attentions=True)
    kinds = found(model, layers={"fusion": [1]}, attentions=True).attentions
    assert list(kinds) == ["image self", "text self", "image to text", "text to image"]


def test_gradients_reach_the_weights():
    model = build_model(CONFIG)
    states = hidden_states(
        model, *image_and_text(), layers={"vision": [1], "fusion": [2]}, attentions=True
    )
    (states.vision[1].sum() + states.attentions["text to image"][2].square().sum()).backward()
    assert model.vision.patch_embedding.weight.grad is not None
    assert model.fusion.text_layers[1].cross_attention.query.weight.grad is not None


def test_another_thread_that_uses_the_model():
    model = build_model(CONFIG)
    expected = found(model, attentions=True)
    other_encodings = random_encodings(build_model(CONFIG, seed=3))

    def use_elsewhere(*_):
        if current_thread() is main_thread():
            thread = Thread(target=lambda: model.fuse(*other_encodings, "all"))
            thread.start()
            thread.join()

    model.text_pooler.register_forward_hook(use_elsewhere)
    states = found(model, attentions=True)
    for number in (1, 2, 3):
        assert torch.equal(states.fused_text[number], expected.fused_text[number])
        assert torch.equal(
            states.attentions["text to image"][number], expected.attentions["text to image"][number]
        )


def test_of_a_predictor(tiny_checkpoint):
    predictor = load(tiny_checkpoint, device="cpu")
    pixels = torch.randint(0, 256, (2, 40, 60, 3), dtype=torch.uint8).numpy()
    texts = ["a red square", "two"]
    states = predictor.hidden_states(
        list(pixels), texts, layers={"text": [1], "fusion": [2]}, attentions=True
    )
    inputs = predictor.processor(list(pixels), texts, padding=True, return_tensors="pt")
    expected = hidden_states(
        predictor.model, inputs.pixel_values, inputs.input_ids, inputs.attention_mask
    )
    assert max_difference(states.text[1], expected.text[1]) < ATOL
    assert max_difference(states.fused_image[2], expected.fused_image[2]) < ATOL
    assert max_difference(states.pooled, expected.pooled) < ATOL
    assert not states.pooled.requires_grad
