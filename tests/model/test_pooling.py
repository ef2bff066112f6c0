"""What heads on towers read: means of tokens, several layers, normalised; in the model, in checkpoints and exports."""

from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
from bridgetower.checkpoints import Checkpoint, convert, read_checkpoint, write_checkpoint
from bridgetower.engines.parts import make_part
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import HeadsConfig, ModelConfig

FEATURES = {"heads__image_pooling": "token_and_mean", "heads__image_pooled_layers": 2, "heads__text_pooling": "mean"}
CONFIG = tiny.changed(**FEATURES, heads__itc_norm=True, heads__itc_dropout=0.2, vision__distillation_token=True)
VISION, TEXT = CONFIG.vision.hidden_size, CONFIG.text.hidden_size
ATOL = 1e-6


def build(config: ModelConfig = CONFIG) -> BridgeTower:
    return tiny.off_defaults(BridgeTower(config)).eval()


def test_by_hand() -> None:
    model, pixels, (ids, mask) = build(), tiny.images(3), tiny.texts([5, 3, 4])
    layers = model.vision(pixels, CONFIG.vision_layers)[-2:]
    image = torch.cat([part for layer in layers for part in (layer[:, 0], layer[:, 2:].mean(dim=1))], dim=-1)
    last = model.text(ids, mask.bool(), CONFIG.text_layers)[-1]
    text = torch.stack([row[:length].mean(dim=0) for row, length in zip(last, (5, 3, 4), strict=True)])
    for outputs in ("layers", "cls"):
        encoded = model.encode_image(pixels, outputs=outputs), model.encode_text(ids, mask, outputs=outputs)
        assert tiny.off(encoded[0].cls, image) < ATOL
        assert tiny.off(encoded[1].cls, text) < ATOL
    head = model.itc_head
    for embeds, features, norm, linear in (
        (model.image_embeds(model.encode_image(pixels)), image, head.image_input[0], head.image),
        (model.text_embeds(model.encode_text(ids, mask)), text, head.text_input[0], head.text),
    ):
        assert isinstance(norm, nn.LayerNorm)
        assert tiny.off(embeds, nn.functional.normalize(linear(norm(features)), dim=-1)) < ATOL


def test_no_text_needs_a_mask() -> None:
    model, (ids, mask) = build(), tiny.texts([4, 4])
    assert tiny.off(model.encode_text(ids).cls, model.encode_text(ids, mask).cls) < ATOL


def test_widths_follow() -> None:
    config = tiny.changed(**FEATURES, heads__image=3, heads__text=2, heads__text_pooled_layers=2)
    model = BridgeTower(config)
    assert (config.image_feature_size, config.text_feature_size) == (4 * VISION, 2 * TEXT)
    assert model.image_head.fc.in_features == model.itc_head.image.in_features == 4 * VISION
    assert model.text_head.dense.in_features == model.itc_head.text.in_features == 2 * TEXT


def test_the_official_head_has_nothing_before_its_projections() -> None:
    names = {name for name, _ in BridgeTower(tiny.CONFIG).itc_head.named_parameters()}
    assert names == {"image.weight", "image.bias", "text.weight", "text.bias", "temperature"}


def test_dropout_in_training_only() -> None:
    model, pixels = build(), tiny.images(2)
    image = model.encode_image(pixels)
    assert torch.equal(model.image_embeds(image), model.image_embeds(image))
    model.train()
    assert tiny.off(model.image_embeds(image), model.image_embeds(image)) > 1e-3


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = build()
    checkpoint = Checkpoint(source="tiny", config=CONFIG, tensors=model.state_dict())
    write_checkpoint(checkpoint, tmp_path / "model")
    again = read_checkpoint(str(tmp_path / "model")).model().eval()
    pixels = tiny.images(2)
    assert torch.equal(again.encode_image(pixels).cls, model.encode_image(pixels).cls)
    with pytest.raises(ValueError, match="contrastive head is the official kind"):
        convert(checkpoint, tmp_path / "hf", "hf")


@pytest.mark.parametrize("name", ["image", "image_cls", "text", "text_cls"])
def test_parts_of_an_export(name: str) -> None:
    part = make_part(build(), name)
    program = part.exported().module()
    for inputs in part.examples():
        for ours, theirs in zip(program(*inputs), part.module(*inputs), strict=True):
            assert tiny.off(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"heads__image_pooling": "max"},
            r"heads\.image_pooling is 'max'; expected one of token, mean",
        ),
        (
            {"heads__text_pooled_layers": 9},
            r"heads\.text_pooled_layers is 9; expected at most \d, the number",
        ),
        ({"heads__image_pooled_layers": 0}, r"heads\.image_pooled_layers is 0; expected a whole number from 1"),
        ({"heads__itc_dropout": 1.0}, r"heads\.itc_dropout is 1\.0; expected a probability"),
        (
            {"heads__itc": "fused", "heads__itc_norm": True},
            r"heads\.itc is fused with pooling, itc_norm",
        ),
    ],
)
def test_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.changed(**values)


def test_defaults_are_the_official_ones() -> None:
    assert not HeadsConfig().reads_more_than_tokens
