"""Costs of items, by the sizes of the model."""

from __future__ import annotations

from typing import Literal

from bridgetower.model.config import FusionConfig, ModelConfig, TextConfig, VisionConfig

Unit = Literal["text", "image", "pair", "gradient", "word"]

_FRACTIONS = 2**20  # of a pair that costs are rounded to; sums of such fractions are exact
_WORD = 2**17  # multiply-adds that take as long as a word of a response


def unit_costs(config: ModelConfig, text_length: int) -> dict[Unit, float]:
    """Returns the cost of each kind of item, and of a word of a response: an image matched with a text costs 1.

    Multiply-adds of all layers count, with texts of the largest length; a backward pass costs twice its forward pass.
    """
    image = _layers(config.vision) * config.vision.num_tokens
    text = _layers(config.text) * text_length
    cross_attention = config.fusion.num_layers * 4 * config.fusion.hidden_size**2
    fusion = (_layers(config.fusion) + cross_attention) * (config.vision.num_tokens + text_length)
    pair = image + text + fusion
    operations: dict[Unit, int] = {
        "text": text,
        "image": image,
        "pair": pair,
        "gradient": pair + 2 * fusion,
        "word": _WORD,
    }
    return {
        unit: max(1, round(_FRACTIONS * count / pair)) / _FRACTIONS
        for unit, count in operations.items()
    }


def _layers(config: VisionConfig | TextConfig | FusionConfig) -> int:
    """Multiply-adds of one token in all layers: projections of the attention, then both of the feed-forward layer."""
    width = config.hidden_size
    return config.num_layers * (4 * width**2 + 2 * width * config.intermediate_size)
