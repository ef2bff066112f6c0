"""Usual mistakes, applied to a model that is right: each must move the outputs as far as it moved the official ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridgetower.checkpoints import Checkpoint
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.fusion import Fused
from bridgetower.model.layers import FeedForward
from golden import variant

Inputs = Mapping[str, Tensor]


class TanhFeedForward(nn.Module):
    def __init__(self, layer: FeedForward) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        down: Tensor = self.layer.down(F.gelu(self.layer.up(hidden), approximate="tanh"))
        return down


def gelu_tanh_in_bert_layers(checkpoint: Checkpoint, inputs: Inputs) -> Fused:
    model = checkpoint.model()
    for layer in (*model.text.layers, *model.fusion.text_layers, *model.fusion.image_layers):
        layer.mlp = TanhFeedForward(layer.mlp)
    return _run(model, inputs)


def gelu_instead_of_quickgelu(checkpoint: Checkpoint, inputs: Inputs) -> Fused:
    return _run(variant(checkpoint, {"vision.activation": "gelu"}), inputs)


def text_mask_ignored(checkpoint: Checkpoint, inputs: Inputs) -> Fused:
    return _run(checkpoint.model(), {**inputs, "text_masks": torch.ones_like(inputs["text_masks"])})


def token_types_swapped(checkpoint: Checkpoint, inputs: Inputs) -> Fused:
    """Text with the image's type embedding and the other way round."""
    table = checkpoint.tensors["token_type_embedding.weight"]
    return _with_tensor(checkpoint, inputs, "token_type_embedding.weight", table.flip(0))


def position_ids_off_by_one(checkpoint: Checkpoint, inputs: Inputs) -> Fused:
    """Text positions that count from the padding id instead of the one after it."""
    table = checkpoint.tensors["text.position_embedding.weight"]
    return _with_tensor(checkpoint, inputs, "text.position_embedding.weight", table.roll(1, 0))


def ln_post_skipped(checkpoint: Checkpoint, inputs: Inputs) -> Fused:
    """Image tower layers handed on without the shared LayerNorm."""
    model = checkpoint.model()
    model.vision.register_module("post_norm", nn.Identity())
    return _run(model, inputs)


def text_link_towers_reversed(checkpoint: Checkpoint, inputs: Inputs) -> Fused:
    """Text bridges in the opposite order, each with the tower layer of its place."""
    model = checkpoint.model()
    model.fusion.text_bridges = nn.ModuleList(reversed(model.fusion.text_bridges))
    for layer, bridge in enumerate(model.fusion.text_bridges, start=2):
        bridge.layer = layer
    return _run(model, inputs)


def cross_eps_1e5(checkpoint: Checkpoint, inputs: Inputs) -> Fused:
    return _run(variant(checkpoint, {"fusion.layer_norm_eps": 1e-5}), inputs)


def image_transposed(checkpoint: Checkpoint, inputs: Inputs) -> Fused:
    return _run(checkpoint.model(), {**inputs, "image": inputs["image"].transpose(2, 3)})


def image_layer_reads_updated_text(checkpoint: Checkpoint, inputs: Inputs) -> Fused:
    """Image stream attending to the text stream's output of the same layer instead of its input."""
    model = checkpoint.model()
    for text_layer, image_layer in zip(model.fusion.text_layers, model.fusion.image_layers, strict=True):
        updated: list[Tensor] = []
        text_layer.register_forward_hook(lambda _layer, _args, output, updated=updated: updated.append(output))
        image_layer.register_forward_pre_hook(lambda _layer, args, updated=updated: (args[0], updated.pop()))
    return _run(model, inputs)


_ALL: tuple[Callable[[Checkpoint, Inputs], Fused], ...] = (
    *(gelu_tanh_in_bert_layers, gelu_instead_of_quickgelu, text_mask_ignored, token_types_swapped),
    *(position_ids_off_by_one, ln_post_skipped, text_link_towers_reversed, cross_eps_1e5, image_transposed),
    image_layer_reads_updated_text,
)
MUTATIONS = {function.__name__: function for function in _ALL}


@torch.no_grad()
def mutated(name: str, checkpoint: Checkpoint, inputs: Inputs) -> dict[str, Tensor]:
    fused = MUTATIONS[name](checkpoint, inputs)
    return {"text_feats": fused.text, "image_feats": fused.image, "cls_feats": fused.pooled}


def _with_tensor(checkpoint: Checkpoint, inputs: Inputs, name: str, tensor: Tensor) -> Fused:
    return _run(replace(checkpoint, tensors=checkpoint.tensors | {name: tensor}).model(), inputs)


def _run(model: BridgeTower, inputs: Inputs) -> Fused:
    fused: Fused = model(inputs["image"], inputs["text_ids"], inputs["text_masks"])
    return fused
