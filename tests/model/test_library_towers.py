"""Towers of timm and transformers: every hidden state is the library's own, also from a description without memory."""

import re
from dataclasses import replace
from functools import partial
from random import Random

import pytest
import torch

from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import VisionConfig
from bridgetower.model.extensions import vision_tower
from bridgetower.model.library_towers import TransformersTower, timm_config, transformers_config
from helpers.checkpoints import TEXT_FAMILIES, VISION_FAMILIES
from helpers.models import (
    SMALL_CONFIG,
    build_model,
    changed_config,
    max_difference,
    off_defaults,
    random_images,
    random_texts,
)

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
OTHERS = (
    "resnet18",
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "convit_tiny",
    "naflexvit_base_patch16_gap",
)
IDS, MASK = random_texts([9, 4, 7])


def drawn_vision(family, seed):
    arguments, size = VISION_FAMILIES[family].draw(Random(seed))
    return timm_config(VISION_FAMILIES[family].name, arguments, size)


def drawn_text(family, seed):
    settings = {"model_type": family, **TEXT_FAMILIES[family](Random(seed))}
    return replace(transformers_config(settings), dropout=0.0)


def published_vision(config, weights):
    settings = {"num_classes": 0, "img_size": config.image_size, **config.settings["arguments"]}
    reference = timm.create_model(config.settings["architecture"], **settings)
    reference.load_state_dict(
        {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    )
    return reference.eval()


def published_text(config, weights):
    settings = dict(config.settings)
    reference = transformers.AutoModel.from_config(
        transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    )
    missing = reference.load_state_dict(
        {name.removeprefix("model."): value for name, value in weights.items()}, strict=False
    )
    assert not missing.unexpected_keys
    assert all(name.startswith("pooler.") for name in missing.missing_keys)
    return reference.eval()


@pytest.mark.parametrize("family", VISION_FAMILIES)
@torch.no_grad()
def test_every_layer_of_an_image_tower(family):
    config = drawn_vision(family, 0)
    tower = off_defaults(vision_tower(config)).eval()
    reference = published_vision(config, tower.state_dict())
    pixels = random_images(2, size=config.image_size)
    prefixed = VISION_FAMILIES[family].prefix_tokens > 0
    last, theirs = reference.forward_intermediates(
        pixels, norm=True, return_prefix_tokens=prefixed, output_fmt="NLC"
    )
    theirs = [
        torch.cat(layer[::-1], dim=1) if isinstance(layer, tuple) else layer for layer in theirs
    ]
    layers = tuple(range(1, config.num_layers + 1))
    ours = tower(pixels, layers)
    assert len(ours) == len(theirs) == config.num_layers >= 3
    assert config.num_prefix_tokens == VISION_FAMILIES[family].prefix_tokens
    assert ours[0].shape == (2, config.num_tokens, config.hidden_size)
    assert max(map(max_difference, ours, theirs)) <= 1e-5
    # norm after pooling
    assert max_difference(ours[-1], last) <= 1e-5 or config.settings["architecture"].endswith(
        "gap_256"
    )
    assert max_difference(tower.pooled(ours[-1]), reference(pixels)) <= 1e-5
    assert max_difference(tower.cls(pixels, 2), tower.pooled(theirs[1])) <= 1e-5
    # another layer
    assert (
        min(max_difference(ours[index], theirs[index + 1]) for index in range(len(ours) - 1)) > 1e-3
    )


@pytest.mark.parametrize("family", TEXT_FAMILIES)
@torch.no_grad()
def test_every_layer_of_a_text_tower(family):
    config = drawn_text(family, 0)
    tower = off_defaults(TransformersTower(config)).eval()
    reference = published_text(config, tower.state_dict())
    layers = tuple(range(1, config.num_layers + 1))
    for mask in (MASK, None):
        theirs = reference(input_ids=IDS, attention_mask=mask, output_hidden_states=True)
        ours = tower(IDS, None if mask is None else mask.bool(), layers)
        is_token = torch.ones_like(IDS).bool() if mask is None else mask.bool()
        assert len(ours) == config.num_layers >= 3
        pairs = zip(ours, theirs.hidden_states[1:], strict=True)
        assert (
            max(
                max_difference(actual[is_token], expected_layer[is_token])
                for actual, expected_layer in pairs
            )
            <= 1e-5
        )
        assert max_difference(ours[-1][is_token], theirs.last_hidden_state[is_token]) <= 1e-5
        assert not any(layer[~is_token].any() for layer in ours)
        shifted = zip(ours, theirs.hidden_states[:-1], strict=True)  # control: another layer
        assert (
            min(
                max_difference(actual[is_token], expected_layer[is_token])
                for actual, expected_layer in shifted
            )
            > 1e-3
        )
    padded = tower(IDS, MASK.bool(), layers)[-1]
    assert max_difference(padded[0], tower(IDS, None, layers)[-1][0]) <= 1e-5
    # control: padding is masked
    assert max_difference(padded[1, :4], tower(IDS, None, layers)[-1][1, :4]) > 1e-3


def checkpoint_and_reference(vision, text):
    config = replace(SMALL_CONFIG, vision=drawn_vision(vision, 0), text=drawn_text(text, 0))
    return config.override({"fusion.dropout": 0.0})


BOTH = checkpoint_and_reference("siglip", "modernbert")


@pytest.mark.parametrize(
    ("vision", "text"),
    [
        ("dinov3", "modernbert"),
        ("eva02", "deberta-v2"),
        ("beit", "modernbert"),
        ("siglip", "deberta-v2"),
        ("rotary, learnt", "modernbert"),
        ("relative positions", "deberta-v2"),
    ],
)
def test_a_model_described_on_meta_has_its_buffers(vision, text):
    config = checkpoint_and_reference(vision, text)
    model = build_model(config)
    pixels = random_images(3, size=config.vision.image_size)
    with torch.device("meta"):
        described = BridgeTower(config)
    assert all(parameter.device.type == "meta" for parameter in described.parameters())
    described.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(
            described.eval()(pixels, IDS, MASK).pooled, model(pixels, IDS, MASK).pooled
        )


def test_checkpointed_activations_change_no_gradient():
    config = checkpoint_and_reference("dinov3", "modernbert")
    model = build_model(config)
    pixels = random_images(3, size=config.vision.image_size)
    gradients = []
    for checkpointed in ((), ("vision", "text")):
        model.train().checkpoint_activations(checkpointed)
        model.zero_grad()
        model(pixels, IDS, MASK).pooled.square().sum().backward()
        gradients.append(
            {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    assert (
        max(max_difference(gradients[0][name], gradients[1][name]) for name in gradients[0]) < 1e-5
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: timm_config("vit_huge_of_mine", {}),
            "timm has no architecture 'vit_huge_of_mine'",
        ),
        *(
            (partial(timm_config, name, {}), f"{name} is no vision transformer of timm whose")
            for name in OTHERS
        ),
        (
            lambda: timm_config("vit_tiny_patch16_224", {"depths": 3}),
            "timm cannot build vit_tiny_patch16_224 with",
        ),
        (
            lambda: transformers_config({"model_type": "mine"}),
            "does not know the model type 'mine'",
        ),
        (
            lambda: transformers_config({"model_type": "t5"}),
            "t5 is an encoder with a decoder; expected an encoder",
        ),
        (
            lambda: vision_tower(VisionConfig(architecture="timm")),
            r"vision\.settings has no architecture",
        ),
        (
            lambda: vision_tower(replace(drawn_vision("siglip", 0), num_layers=2)),
            r"vision\.num_layers is 2, but",
        ),
    ],
)
def test_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_texts_that_are_too_long():
    config = drawn_text("deberta-v2", 0)
    ids = torch.full((1, config.max_length + 1), 5)
    with pytest.raises(
        ValueError, match=f"text of {config.max_length + 1} tokens; the position table holds"
    ):
        TransformersTower(config)(ids, None, (1,))


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        (SMALL_CONFIG, {"vision.layers.3", "text.layers.2"}),
        (
            changed_config(fusion__vision_layers=(1, 3), fusion__text_layers=(1, 2)),
            {"vision.layers.2", "text.layers.1"},
        ),
        (
            BOTH,
            {
                f"vision.model.blocks.{BOTH.vision.num_layers - 1}",
                f"text.model.layers.{BOTH.text.num_layers - 1}",
            },
        ),
    ],
    ids=["ours", "layers that are read", "libraries"],
)
def test_only_top_layers_train(config, trained):
    model = build_model(config)
    model.train_top_layers(1)
    assert model.cached_layers((1, 3)) == (1, 2)
    model(
        random_images(3, size=config.vision.image_size), IDS, MASK
    ).pooled.square().sum().backward()
    names = [name for name, value in model.named_parameters() if value.grad is not None]
    towers = {
        re.match(r"\D+\.\d+", name)[0] for name in names if name.startswith(("vision.", "text."))
    }
    assert towers == trained
    with pytest.raises(ValueError, match="9 layers to train, but"):
        model.train_top_layers(9)


def test_cached_states_are_for_towers_of_the_package():
    model = build_model(BOTH)
    for tower, name in ((model.vision, "TimmTower"), (model.text, "TransformersTower")):
        with pytest.raises(
            ValueError,
            match=f"{name} cannot go on from cached states; leave out train_top or freeze",
        ):
            tower.states(IDS, None, (1,))


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize(
    "changes", [{}, {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0.3}]
)
def test_the_rate_of_dropout_is_that_of_the_config(changes, rate):
    config = transformers_config(
        {"model_type": "bert", **TEXT_FAMILIES["bert"](Random(0)), **changes}
    )
    tower = TransformersTower(replace(config, dropout=rate)).train()
    assert {module.p for module in tower.modules() if isinstance(module, torch.nn.Dropout)} == {
        rate
    }
    first, second = (tower(IDS, MASK.bool(), (1,))[0] for _ in range(2))
    assert torch.equal(first, second) == (rate == 0)
