"""transformers' BridgeTower folders: config and names, both ways."""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from bridgetower.checkpoints.checkpoint import Checkpoint, check_depth, collect, extra_tensor_names, parameter_shapes
from bridgetower.checkpoints.keymap import export_tensors, name_table
from bridgetower.checkpoints.reranking import UNMEASURED
from bridgetower.checkpoints.tensors import extent
from bridgetower.model.config import (
    Activation,
    BridgeKind,
    FusionConfig,
    HeadsConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from bridgetower.model.heads import HEADS, chosen_heads
from bridgetower.model.plain import known_fields

_LINK_PARTS = r"LayerNorm\.(weight|bias)|scaled_factor|beta"
_DROPPABLE = (
    *(r".*\.position_ids", r".*\.token_type_ids"),
    rf"(bridgetower\.)?cross_modal_(text|image)_link_tower\.({_LINK_PARTS})",  # shared by no layers, if there is one
)
_ACTIVATIONS: dict[str, Activation] = {  # the first of several names is written
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "quick_gelu": "quick_gelu",
    "gelu_python": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_ACTIVATION_NAMES = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
_BACKBONE = "bridgetower."
_LINK_TOWERS = ("add", "scaled_add", "interpolate")  # bridge kinds that transformers has
_DEEPEST = 1_000  # layers
_TEXT_FIELDS = {  # theirs to ours, of the text tower and, the second part, also of the fusion layers
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "type_vocab_size",
    "pad_token_id": "pad_token_id",
}
_LAYER_FIELDS = {
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    # One field in transformers for the text tower (1e-5) and the fusion layers (1e-12 in the official code).
    "layer_norm_eps": "layer_norm_eps",
    "hidden_dropout_prob": "dropout",
}

logger = logging.getLogger(__name__)


# What is read of transformers' BridgeTowerTextConfig, …VisionConfig and …Config, with their defaults, for configs that
# list only what differs.
@dataclass(frozen=True)
class _Text:
    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 514
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    pad_token_id: int = 1


@dataclass(frozen=True)
class _Vision:
    hidden_size: int = 768
    num_hidden_layers: int = 12
    patch_size: int | tuple[int, ...] = 16
    image_size: int | tuple[int, ...] = 288
    layer_norm_eps: float = 1e-5
    remove_last_layer: bool = False

    @property
    def blocks(self) -> int:
        return self.num_hidden_layers - self.remove_last_layer


@dataclass(frozen=True)
class _Top:
    hidden_size: int = 768
    num_hidden_layers: int = 6
    layer_norm_eps: float = 1e-5
    link_tower_type: str = "add"
    share_cross_modal_transformer_layers: bool = True
    share_link_tower_layers: bool = False
    tie_word_embeddings: bool = False
    hidden_act: str = "gelu"
    contrastive_hidden_size: int = 512


def read_checkpoint(
    source: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> Checkpoint:
    """Builds a checkpoint from transformers' `config.json` and tensors, in the number format `dtype` if it is given."""
    top = known_fields(_Top, values, f"{source}/config.json")
    text = known_fields(_Text, values.get("text_config") or {}, f"{source}/config.json: text_config")
    vision = known_fields(_Vision, values.get("vision_config") or {}, f"{source}/config.json: vision_config")
    prefix = _BACKBONE if any(name.startswith(_BACKBONE) for name in tensors) else ""
    decoder, words = "mlm_score.decoder.weight", f"{prefix}text_model.embeddings.word_embeddings.weight"
    if top.tie_word_embeddings and "mlm_score.bias" in tensors and decoder not in tensors and words in tensors:
        tensors = ChainMap({decoder: tensors[words].clone()}, tensors)  # type: ignore[arg-type]  # reads only
    config = _model_config(source, top, text, vision, tensors)
    options: dict[str, Any] = {"separate_projections": config.fusion.separate_projections, "backbone_prefix": prefix}
    extra = vision.blocks - config.vision.num_layers
    check_depth(source, config, tensors)
    table = name_table(parameter_shapes(config), "huggingface", **options)
    extra_table = name_table(extra_tensor_names(config, extra), "huggingface", **options)
    return collect(source, config, tensors, table, extra_table, _DROPPABLE, dtype)


def export(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = checkpoint.config
    if reasons := _obstacles(config):
        raise ValueError(f"transformers cannot hold {checkpoint.source}: {'; '.join(reasons)}")
    text, fusion, heads = config.text, config.fusion, config.heads
    shared: list[tuple[str, object, object]] = [  # what transformers lacks or shares, our value, and the one that wins
        ("record of reranking", checkpoint.reranking.to_plain(), UNMEASURED.to_plain()),
        ("layer norm eps of the fusion layers", fusion.layer_norm_eps, text.layer_norm_eps),
        ("dropout of the fusion layers", fusion.dropout, text.dropout),
        ("attention dropout of the fusion layers", fusion.attention_dropout, text.attention_dropout),
    ]
    if heads.mlm:
        shared.append(("layer norm eps of the MLM head", heads.mlm_layer_norm_eps, fusion.bridge_layer_norm_eps))
    for name, ours, theirs in shared:
        if ours != theirs:
            logger.warning(
                "%s: transformers has no field for the %s: %s becomes %s", checkpoint.source, name, ours, theirs
            )
    prefix = _BACKBONE if heads.mlm or heads.itm or heads.itc else ""
    tensors = dict(checkpoint.tensors) | checkpoint.extra_tensors
    if "text.pooler.dense.weight" not in tensors:  # transformers builds this pooler but never reads it
        tensors["text.pooler.dense.weight"] = torch.zeros(text.hidden_size, text.hidden_size)
        tensors["text.pooler.dense.bias"] = torch.zeros(text.hidden_size)
    options: dict[str, Any] = {"separate_projections": fusion.separate_projections, "backbone_prefix": prefix}
    table = name_table(tensors, "huggingface", **options)
    return _config_values(checkpoint), export_tensors(table, tensors)


def _model_config(source: str, top: _Top, text: _Text, vision: _Vision, tensors: Mapping[str, Tensor]) -> ModelConfig:
    depth, fusion_depth, width = text.num_hidden_layers, top.num_hidden_layers, vision.hidden_size
    unknown = {text.hidden_act, top.hidden_act} - _ACTIVATIONS.keys()
    refused = {
        "share_link_tower_layers is true": top.share_link_tower_layers and fusion_depth > 1,
        f"link_tower_type is {top.link_tower_type!r}": top.link_tower_type not in _LINK_TOWERS,
        f"hidden_act is {', '.join(sorted(unknown))}, not one of {', '.join(_ACTIVATIONS)}": bool(unknown),
        f"hidden_size {top.hidden_size} differs from the text tower's": top.hidden_size != text.hidden_size,
        "the image tower is shallower than the text tower": vision.blocks < depth,
        f"one of its parts has less than 1 or more than {_DEEPEST} layers": (
            min(depth, fusion_depth) < 1 or max(depth, fusion_depth, vision.blocks) > _DEEPEST
        ),
    }
    if reasons := [reason for reason, applies in refused.items() if applies]:
        raise ValueError(f"{source}: config.json describes a model that is not supported: {'; '.join(reasons)}")
    bridged = tuple(range(depth - fusion_depth + 1, depth + 1))
    itc, same_dropout = "itc_text_head.fc.weight", text.attention_probs_dropout_prob == text.hidden_dropout_prob
    shared: dict[str, Any] = {ours: getattr(text, theirs) for theirs, ours in _LAYER_FIELDS.items()}
    shared |= {  # transformers builds the fusion layers from the text config
        "activation": _ACTIVATIONS[text.hidden_act],
        "attention_dropout": None if same_dropout else text.attention_probs_dropout_prob,
    }
    return ModelConfig(
        vision=VisionConfig(
            image_size=_side(vision.image_size),
            patch_size=_side(vision.patch_size),
            hidden_size=width,
            num_layers=depth,  # transformers walks both towers together; deeper blocks are never reached
            num_heads=width // 64,
            intermediate_size=4 * width,
            layer_norm_eps=vision.layer_norm_eps,
        ),
        text=TextConfig(
            num_layers=depth, **{ours: getattr(text, theirs) for theirs, ours in _TEXT_FIELDS.items()}, **shared
        ),
        fusion=FusionConfig(
            hidden_size=top.hidden_size,
            num_layers=fusion_depth,
            bridge=cast(BridgeKind, top.link_tower_type),
            vision_layers=bridged,
            text_layers=bridged,
            separate_projections=not top.share_cross_modal_transformer_layers,
            bridge_layer_norm_eps=top.layer_norm_eps,
            **shared,
        ),
        heads=HeadsConfig(
            mlm="mlm_score.bias" in tensors,
            itm="itm_score.fc.weight" in tensors,
            itc="fused" if "itc_cross_modal_head.fc.weight" in tensors else None,
            itc_size=extent(tensors, itc) if itc in tensors else top.contrastive_hidden_size,
            mlm_layer_norm_eps=top.layer_norm_eps,
            mlm_activation=_ACTIVATIONS[top.hidden_act],
        ),
    )


def _side(value: int | tuple[int, ...]) -> int:
    sides = (value,) if isinstance(value, int) else value
    if len(set(sides)) != 1:
        raise ValueError(f"image or patch size {sides} is not square; expected equal sides")
    return sides[0]


def _obstacles(config: ModelConfig) -> list[str]:
    vision, text, fusion = config.vision, config.text, config.fusion
    depth = config.text.num_layers
    bridged = tuple(range(depth - fusion.num_layers + 1, depth + 1))
    own = {vision.architecture, text.architecture} - {"vit", "bert"}
    lacking = [name for name in chosen_heads(config.heads) if name not in HEADS or not HEADS[name].in_transformers]
    checks = {
        f"it has towers of timm, of transformers or custom ones ({', '.join(sorted(own))})": bool(own),
        "it has no bridges (METER)": fusion.bridge is None,
        f"its bridge is {fusion.bridge}, not one of {', '.join(_LINK_TOWERS)}": (
            fusion.bridge not in (None, *_LINK_TOWERS)
        ),
        "its fusion encoder has no LayerNorm on its input": fusion.bridge is not None and not fusion.input_norm,
        "its fusion width, heads or feed-forward differ from the text tower's": (
            (fusion.hidden_size, fusion.num_heads, fusion.intermediate_size)
            != (text.hidden_size, text.num_heads, text.intermediate_size)
        ),
        "its image tower is not CLIP's": (
            vision.activation != "quick_gelu" or not vision.pre_norm or vision.patch_bias or vision.distillation_token
        ),
        "its image heads are not as many as fit with a width of 64": vision.num_heads != vision.hidden_size // 64,
        "its image feed-forward is not four times the width": vision.intermediate_size != 4 * vision.hidden_size,
        "its text tower is BERT": text.positions != "roberta",
        "its bridges are not fed from the same top layers of both towers": (
            config.vision_layers != bridged or config.text_layers != bridged
        ),
        f"it has heads that transformers lacks ({', '.join(lacking)})": bool(lacking),
        "it has more than two token types (NLVR2)": fusion.num_token_types != 2,
        "it has embeddings of tower layers": fusion.layer_embeddings,
        "the activation of its fusion layers differs from the text tower's": fusion.activation != text.activation,
        "its contrastive head is the official kind, on the towers; drop_itc=True leaves it out": (
            config.heads.itc == "tower"
        ),
        # transformers spreads the token type over the image tower's width there, and calls one projection.
        "its contrastive head needs an image tower as wide as the fusion encoder and a shared projection": (
            config.heads.itc == "fused" and (vision.hidden_size != fusion.hidden_size or fusion.separate_projections)
        ),
    }
    return [reason for reason, applies in checks.items() if applies]


def _config_values(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    vision, text, fusion = config.vision, config.text, config.fusion
    extra_layers = {name.split(".")[2] for name in checkpoint.extra_tensors if name.startswith("vision.layers.")}
    norms = {name.split(".")[2] for name in checkpoint.extra_tensors if name.startswith("vision.separate_norms.")}
    blocks, heads = vision.num_layers + len(extra_layers), config.heads
    architectures = {
        "BridgeTowerForContrastiveLearning": heads.itc,
        "BridgeTowerForMaskedLM": heads.mlm,
        "BridgeTowerForImageAndTextRetrieval": heads.itm,
        "BridgeTowerModel": True,
    }
    return {
        "model_type": "bridgetower",
        "architectures": [next(name for name, present in architectures.items() if present)],
        "hidden_size": fusion.hidden_size,
        "num_hidden_layers": fusion.num_layers,
        "num_attention_heads": fusion.num_heads,
        "layer_norm_eps": fusion.bridge_layer_norm_eps,
        "hidden_act": _ACTIVATION_NAMES[heads.mlm_activation],
        "link_tower_type": fusion.bridge,
        "share_cross_modal_transformer_layers": not fusion.separate_projections,
        "share_link_tower_layers": False,
        "tie_word_embeddings": False,
        "contrastive_hidden_size": heads.itc_size,
        "logit_scale_init_value": 2.6592,
        "text_config": {
            **{theirs: getattr(text, ours) for theirs, ours in (_TEXT_FIELDS | _LAYER_FIELDS).items()},
            "num_hidden_layers": text.num_layers,
            "hidden_act": _ACTIVATION_NAMES[text.activation],
            "attention_probs_dropout_prob": (
                text.dropout if text.attention_dropout is None else text.attention_dropout
            ),
        },
        "vision_config": {
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": max(blocks, len(norms)),
            "remove_last_layer": len(norms) > blocks,  # they are made for the removed layer, too
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "share_layernorm": not norms,
        },
    }
