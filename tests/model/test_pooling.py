"""What heads on towers read: first tokens or means of tokens; in the model, in checkpoints and exports."""

from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
from bridgetower.checkpoints import Checkpoint, convert, read_checkpoint, write_checkpoint
from bridgetower.engines.parts import Part
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import ModelConfig

CONFIG = tiny.changed(
    heads__image_pooling="mean", heads__text_pooling="mean", heads__itc_dropout=0.2, vision__distillation_token=True
)
ATOL = 1e-6


def build(config: ModelConfig = CONFIG) -> BridgeTower:
    return tiny.off_defaults(BridgeTower(config)).eval()


def test_by_hand() -> None:
    model, pixels, (ids, mask) = build(), tiny.images(3), tiny.texts([5, 3, 4])
    image = model.vision(pixels, CONFIG.vision_layers)[-1][:, 2:].mean(dim=1)
    last = model.text(ids, mask.bool(), CONFIG.text_layers)[-1]
    text = torch.stack([row[:length].mean(dim=0) for row, length in zip(last, (5, 3, 4), strict=True)])
    for outputs in ("layers", "cls"):
        encoded = model.encode_image(pixels, outputs=outputs), model.encode_text(ids, mask, outputs=outputs)
        assert tiny.off(encoded[0].cls, image) < ATOL
        assert tiny.off(encoded[1].cls, text) < ATOL
    head = model.itc_head
    for embeds, features, linear in (
        (model.image_embeds(model.encode_image(pixels)), image, head.image),
        (model.text_embeds(model.encode_text(ids, mask)), text, head.text),
    ):
        assert tiny.off(embeds, nn.functional.normalize(linear(features), dim=-1)) < ATOL


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


def test_parts_of_an_export() -> None:
    part = Part(build(), "text")
    program = part.exported().module()
    for inputs in part.examples():
        for ours, theirs in zip(program(*inputs), part(*inputs), strict=True):
            assert tiny.off(ours, theirs) < 1e-5
