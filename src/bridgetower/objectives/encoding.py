"""Encodings of a batch, from pixel values and token ids or from what frozen towers made of them before."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridgetower.data.batch import CachedFeatures
from bridgetower.model.bridgetower import IMAGE, BridgeTower, EncodeOutputs
from bridgetower.model.encodings import Encoded
from bridgetower.model.towers import Tower


def encode_image(
    model: BridgeTower,
    images: Float[Tensor, "b 3 h w"] | CachedFeatures,
    token_type: int = IMAGE,
    *,
    outputs: EncodeOutputs = "layers",
) -> Encoded:
    """Encodes images, see `BridgeTower.encode_image`; hidden states of its tower are read and projected."""
    if isinstance(images, Tensor):
        return model.encode_image(images.to(model.device, non_blocking=True), token_type, outputs=outputs)
    if outputs == "cls":
        if model.trained_top:
            return Encoded((), model.image_features(_hidden(model, "vision", images, 1)[0]))
        return Encoded((), images.vectors(lambda image: model.image_features(_hidden(model, "vision", image, 1)[0])))
    return model.project_image(_hidden(model, "vision", images), token_type)


def _hidden(
    model: BridgeTower,
    part: Literal["vision", "text"],
    features: CachedFeatures,
    top: int = 0,
    mask: Bool[Tensor, "b l"] | None = None,
) -> list[Float[Tensor, "b l w"]]:
    """The hidden states of the `top` bridged layers of a tower, 0 for all; layers that train are run."""
    if not model.trained_top:
        return features.layers(top, device=model.device)
    read = model.config.vision_layers if part == "vision" else model.config.text_layers
    by_layer = dict(zip(model.cached_layers(read), features.layers(device=model.device), strict=True))
    tower: Tower = getattr(model, part)
    return tower.continued(by_layer, mask, read[-top:])


def encode_text(
    model: BridgeTower,
    texts: Int[Tensor, "b l"] | CachedFeatures,
    attention_mask: Int[Tensor, "b l"] | None,
    *,
    outputs: EncodeOutputs = "layers",
) -> Encoded:
    """Encodes texts, see `BridgeTower.encode_text`; hidden states of its tower are read and projected."""
    if isinstance(texts, Tensor):
        return model.encode_text(texts.to(model.device, non_blocking=True), attention_mask, outputs=outputs)
    mask = None if attention_mask is None else attention_mask.to(model.device, non_blocking=True).bool()
    if outputs == "cls":
        if model.trained_top:
            return Encoded((), model.text_features(_hidden(model, "text", texts, 1, mask)[0], mask))
        return Encoded((), texts.vectors(lambda text: model.text_features(_hidden(model, "text", text, 1)[0], None)))
    encoded = model.project_text(_hidden(model, "text", texts, mask=mask), mask)
    length = encoded.layers[0].shape[1]
    return encoded if (missing := model.padding(length)) is None else encoded.padded(length + missing)
