"""Usual mistakes, applied to a model that is right: each must move the outputs as far as it moved the official ones."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from golden import variant


class TanhFeedForward(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden):
        return self.layer.down(F.gelu(self.layer.up(hidden), approximate="tanh"))


def gelu_tanh_in_bert_layers(checkpoint, inputs):
    model = checkpoint.model()
    for layer in (*model.text.layers, *model.fusion.text_layers, *model.fusion.image_layers):
        layer.mlp = TanhFeedForward(layer.mlp)
    return _run_tests(model, inputs)


def gelu_instead_of_quickgelu(checkpoint, inputs):
    return _run_tests(variant(checkpoint, {"vision.activation": "gelu"}), inputs)


def text_mask_ignored(checkpoint, inputs):
    return _run_tests(
        checkpoint.model(), {**inputs, "text_masks": torch.ones_like(inputs["text_masks"])}
    )


def token_types_swapped(checkpoint, inputs):
    table = checkpoint.tensors["token_type_embedding.weight"]
    return _with_tensor(checkpoint, inputs, "token_type_embedding.weight", table.flip(0))


def position_ids_off_by_one(checkpoint, inputs):
    table = checkpoint.tensors["text.position_embedding.weight"]
    return _with_tensor(checkpoint, inputs, "text.position_embedding.weight", table.roll(1, 0))


def ln_post_skipped(checkpoint, inputs):
    model = checkpoint.model()
    model.vision.register_module("post_norm", nn.Identity())
    return _run_tests(model, inputs)


def text_link_towers_reversed(checkpoint, inputs):
    model = checkpoint.model()
    model.fusion.text_bridges = nn.ModuleList(reversed(model.fusion.text_bridges))
    for layer, bridge in enumerate(model.fusion.text_bridges, start=2):
        bridge.layer = layer
    return _run_tests(model, inputs)


def cross_eps_1e5(checkpoint, inputs):
    return _run_tests(variant(checkpoint, {"fusion.layer_norm_eps": 1e-5}), inputs)


def image_transposed(checkpoint, inputs):
    return _run_tests(checkpoint.model(), {**inputs, "image": inputs["image"].transpose(2, 3)})


def image_layer_reads_updated_text(checkpoint, inputs):
    model = checkpoint.model()
    for text_layer, image_layer in zip(
        model.fusion.text_layers, model.fusion.image_layers, strict=True
    ):
        updated = []
        text_layer.register_forward_hook(
            lambda _layer, _args, output, updated=updated: updated.append(output)
        )
        image_layer.register_forward_pre_hook(
            lambda _layer, args, updated=updated: (args[0], updated.pop())
        )
    return _run_tests(model, inputs)


_ALL = (
    gelu_tanh_in_bert_layers,
    gelu_instead_of_quickgelu,
    text_mask_ignored,
    token_types_swapped,
    position_ids_off_by_one,
    ln_post_skipped,
    text_link_towers_reversed,
    cross_eps_1e5,
    image_transposed,
    image_layer_reads_updated_text,
)
MUTATIONS = {function.__name__: function for function in _ALL}


@torch.no_grad()
def mutated(name, checkpoint, inputs):
    fused = MUTATIONS[name](checkpoint, inputs)
    return {"text_feats": fused.text, "image_feats": fused.image, "cls_feats": fused.pooled}


def _with_tensor(checkpoint, inputs, name, tensor):
    return _run_tests(
        replace(checkpoint, tensors=checkpoint.tensors | {name: tensor}).model(), inputs
    )


def _run_tests(model, inputs):
    return model(inputs["image"], inputs["text_ids"], inputs["text_masks"])
