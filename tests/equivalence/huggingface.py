"""Small random models of transformers, what they compute, and what this package computes from their folders."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import (
    BridgeTowerConfig,
    BridgeTowerForContrastiveLearning,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForMaskedLM,
    BridgeTowerModel,
)

from bridgetower.checkpoints.keymap import export_tensors, name_table
from helpers.models import off_defaults, output_weights

KINDS = {"backbone": BridgeTowerModel, "mlm": BridgeTowerForMaskedLM}
KINDS |= {"itm": BridgeTowerForImageAndTextRetrieval, "itc": BridgeTowerForContrastiveLearning}

_TOP = {"hidden_size": 48, "num_hidden_layers": 2, "contrastive_hidden_size": 20}
_TEXT = {"vocab_size": 70, "max_position_embeddings": 20}
_TEXT |= {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 56,
}
_VISION = {"hidden_size": 128, "num_hidden_layers": 3, "image_size": 32, "patch_size": 16}

# The contrastive model of transformers runs with these only, and with a shared projection.
EQUAL_WIDTHS = {
    "hidden_size": 64,
    "text.hidden_size": 64,
    "text.num_attention_heads": 4,
    "vision.hidden_size": 64,
}
# What differs from the settings above; `text.` and `vision.` are the tower's own.
VARIANTS = {
    "plain": {},
    "scaled_add": {"link_tower_type": "scaled_add"},
    "interpolate": {"link_tower_type": "interpolate"},
    "one fusion layer": {"num_hidden_layers": 1},
    "every layer has a bridge": {"num_hidden_layers": 3},
    "four of five layers": {
        "num_hidden_layers": 4,
        "text.num_hidden_layers": 5,
        "vision.num_hidden_layers": 5,
    },
    "deeper image tower": {"vision.num_hidden_layers": 5},
    "separate norms": {"vision.share_layernorm": False},
    "separate norms, deeper image tower": {
        "vision.share_layernorm": False,
        "vision.num_hidden_layers": 5,
    },
    "equal widths": EQUAL_WIDTHS,
    "patch 14 at 28": {"vision.patch_size": 14, "vision.image_size": 28},
    "patch 14 at 42": {"vision.patch_size": 14, "vision.image_size": 42},
    "three eps": {
        "layer_norm_eps": 1e-3,
        "text.layer_norm_eps": 5e-3,
        "vision.layer_norm_eps": 1e-2,
    },
    "pad is 0": {"text.pad_token_id": 0},
    "two segments": {"text.type_vocab_size": 2},
    "own projection per layer": {"share_cross_modal_transformer_layers": False},
    "two dropouts": {"text.hidden_dropout_prob": 0.2, "text.attention_probs_dropout_prob": 0.3},
    "gelu_new": {"hidden_act": "relu", "text.hidden_act": "gelu_new"},
    "relu": {"hidden_act": "gelu_new", "text.hidden_act": "relu"},
    "one head of width 96": {"vision.hidden_size": 96},
    "layer removed": {
        "vision.remove_last_layer": True,
        "vision.num_hidden_layers": 4,
        "vision.share_layernorm": False,
    },
}
# The same, whose settings come back under other names.
RENAMED = {
    "gelu_python": {"hidden_act": "gelu_python", "text.hidden_act": "gelu_fast"},
    "last layer removed, one norm": {
        "vision.remove_last_layer": True,
        "vision.num_hidden_layers": 5,
    },
    "shared bridges of one layer": {"share_link_tower_layers": True, "num_hidden_layers": 1},
}


def random_model(kind, changes=None, seed=0):
    values = {"": dict(_TOP), "text": dict(_TEXT), "vision": dict(_VISION)}
    for path, value in ((EQUAL_WIDTHS if kind == "itc" else {}) | dict(changes or {})).items():
        prefix, _, name = path.rpartition(".")
        values[prefix][name] = value
    values[""] |= {"text_config": values["text"], "vision_config": values["vision"]}
    config = BridgeTowerConfig(**values[""], logit_scale_init_value=2.6592)
    return off_defaults(KINDS[kind](config), seed).eval()


def inputs(model, image_size=None, seed=2):
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    side = image_size or config.vision_config.image_size
    padding = config.text_config.pad_token_id
    ids = torch.randint(padding + 2, config.text_config.vocab_size, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 4:] = padding
    mask[1, 4:] = 0
    pixel_values = torch.randn(2, 3, side, side, generator=generator)
    return {"pixel_values": pixel_values, "input_ids": ids, "attention_mask": mask}


def their_outputs(model, batch, **options):
    result = model(**batch, **options)
    if isinstance(model, BridgeTowerModel):
        return {
            "text": result.text_features,
            "image": result.image_features,
            "pooled": result.pooler_output,
        }
    if isinstance(model, BridgeTowerForContrastiveLearning):
        embeds = {
            "image": result.image_embeds,
            "text": result.text_embeds,
            "pair": result.cross_embeds,
        }
        return embeds | {"logit_scale": model.logit_scale.exp()}
    return {"logits": result.logits}


def our_outputs(model, batch):
    image = model.encode_image(batch["pixel_values"])
    text = model.encode_text(batch["input_ids"], batch["attention_mask"])
    fused = model.fuse(image, text, "all")
    if model.config.heads.itc == "fused":
        embeds = {"image": model.image_embeds(image), "text": model.text_embeds(text)}
        head = model.head("itc")
        return embeds | {"pair": model.pair_embeds(fused.pooled), "logit_scale": head.logit_scale()}
    if model.mlm_head is not None:
        return {"logits": model.mlm_head(fused.text)}
    if model.itm_head is not None:
        return {"logits": model.itm_head(fused.pooled)}
    return {"text": fused.text, "image": fused.image, "pooled": fused.pooled}


def backpropagate(outputs, batch):
    """Sends fixed random gradients back from every output but positions of padding."""
    weights = output_weights(outputs)
    for name in outputs.keys() & {"text", "logits"}:
        if outputs[name].ndim == 3:
            weights[name] = weights[name] * batch["attention_mask"][..., None]
    torch.stack([(outputs[name] * weights[name]).sum() for name in outputs]).sum().backward()


def their_gradients(model):
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def our_gradients(checkpoint, model):
    gradients = {
        name: value.grad for name, value in model.named_parameters() if value.grad is not None
    }
    return export_tensors(table(checkpoint, gradients), gradients)


def table(checkpoint, names):
    heads = checkpoint.config.heads
    prefix = "bridgetower." if heads.mlm or heads.itm or heads.itc else ""
    separate = checkpoint.config.fusion.separate_projections
    return name_table(names, "huggingface", separate_projections=separate, backbone_prefix=prefix)


def reload(folder, kind):
    """Reads a folder with transformers, without missing, unused or reshaped weights."""
    model, info = KINDS[kind].from_pretrained(folder, output_loading_info=True)
    assert {name: list(value) for name, value in info.items() if value} == {}
    return model.eval()
