"""Encodings of a batch, from pixel values and token ids or from what frozen towers made of them before."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from bridgetower.data.batch import CachedFeatures
from bridgetower.model.bridgetower import IMAGE, BridgeTower, EncodeOutputs
from bridgetower.model.encodings import Encoded


def encode_image(
    model: BridgeTower,
    images: Float[Tensor, "b 3 h w"] | CachedFeatures,
    token_type: int = IMAGE,
    *,
    outputs: EncodeOutputs = "layers",
) -> Encoded:
    """Encodes images, see `BridgeTower.encode_image`; hidden states of its tower are read and projected."""
    if isinstance(images, Tensor):
        return model.encode_image(images.to(model.device), token_type, outputs=outputs)
    if outputs == "cls":
        return Encoded((), model.image_features(_moved(model, images.layers(model.config.heads.image_pooled_layers))))
    return model.project_image(_moved(model, images.layers()), token_type)


def _moved(model: BridgeTower, layers: list[Tensor]) -> list[Tensor]:
    return [layer.to(model.device) for layer in layers]


def encode_text(
    model: BridgeTower,
    texts: Int[Tensor, "b l"] | CachedFeatures,
    attention_mask: Int[Tensor, "b l"] | None,
    *,
    outputs: EncodeOutputs = "layers",
) -> Encoded:
    """Encodes texts, see `BridgeTower.encode_text`; hidden states of its tower are read and projected."""
    if isinstance(texts, Tensor):
        return model.encode_text(texts.to(model.device), attention_mask, outputs=outputs)
    if outputs == "cls":
        mask = None if attention_mask is None else attention_mask.to(model.device).bool()
        return Encoded(
            (), model.text_features(_moved(model, texts.layers(model.config.heads.text_pooled_layers)), mask)
        )
    return model.project_text(_moved(model, texts.layers()), attention_mask)
