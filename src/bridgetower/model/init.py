"""Random weights of a new model."""

from __future__ import annotations

import torch
from torch import nn

from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.towers import TextTransformer, VisionTransformer


@torch.no_grad()
def init_weights(model: BridgeTower, generator: torch.Generator) -> None:
    """Draws all weights from `generator`: normal, zero biases, unit LayerNorms.

    The standard deviation is BERT's 0.02 at BERT's width of 768; in a narrower text tower or fusion encoder it is
    larger, so that what comes out of a layer has the same size. The image tower follows CLIP: its residual
    branches shrink with depth and its embeddings scale with width. Temperatures and the weights of
    bridges that are no linear layer keep the values that their modules set, and towers of one's own all of theirs.
    """
    text_tower = set(model.text.modules())
    towers = (model.vision, model.text)
    own = [tower for tower in towers if not isinstance(tower, VisionTransformer | TextTransformer)]
    left = {module for tower in own for module in tower.modules()}
    for module in model.modules():
        if module in left:
            continue
        width = (model.config.text if module in text_tower else model.config.fusion).hidden_size
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
        elif isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            module.weight.normal_(std=_std(width), generator=generator)
            if not isinstance(module, nn.Embedding) and module.bias is not None:
                module.bias.zero_()
    if isinstance(model.vision, VisionTransformer):
        model.vision.init_weights(generator)


def _std(width: int) -> float:
    return 0.02 * max(1.0, (768 / width) ** 0.5)
