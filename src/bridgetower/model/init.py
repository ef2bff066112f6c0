"""Initial weights for training from scratch."""

import torch
from torch import nn

from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.layers import PreNormLayer


@torch.no_grad()
def init_weights(model: BridgeTower, generator: torch.Generator) -> None:
    """Draws all weights from `generator`: normal, zero biases, unit LayerNorms.

    The standard deviation is BERT's 0.02 at BERT's width of 768; in a narrower text tower or fusion encoder it is
    larger, so that what comes out of a layer has the same size. The image tower follows CLIP: its residual
    branches shrink with depth and its embeddings scale with width. Learned scalars (temperature, bridge scales) keep
    the values that their modules set.
    """
    text_tower = set(model.text.modules())
    for module in model.modules():
        width = (model.config.text if module in text_tower else model.config.fusion).hidden_size
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
        elif isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            module.weight.normal_(std=_std(width), generator=generator)
            if not isinstance(module, nn.Embedding) and module.bias is not None:
                module.bias.zero_()
    _init_vision(model, generator)


def _std(width: int) -> float:
    return 0.02 * max(1.0, (768 / width) ** 0.5)


def _init_vision(model: BridgeTower, generator: torch.Generator) -> None:
    tower, config = model.vision, model.config.vision
    width = config.hidden_size**-0.5
    branch = width * (2 * config.num_layers) ** -0.5
    tower.class_embedding.normal_(std=width, generator=generator)
    if tower.distillation_embedding is not None:
        tower.distillation_embedding.normal_(std=width, generator=generator)
    tower.position_embedding.normal_(std=width, generator=generator)
    fan_in = 3 * config.patch_size**2
    tower.patch_embedding.weight.normal_(std=fan_in**-0.5, generator=generator)
    for layer in tower.layers:
        assert isinstance(layer, PreNormLayer)
        layer.attention.qkv.weight.normal_(std=width, generator=generator)
        layer.attention.out.weight.normal_(std=branch, generator=generator)
        layer.mlp.up.weight.normal_(std=(2 * config.hidden_size) ** -0.5, generator=generator)
        layer.mlp.down.weight.normal_(std=branch, generator=generator)
