"""transformers' BridgeTower folders: config and names, both ways."""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bridgetower.checkpoints.checkpoint import (
    Checkpoint,
    check_depth,
    collect,
    extra_tensor_names,
    parameter_shapes,
)
from bridgetower.checkpoints.keymap import export_tensors, name_table
from bridgetower.checkpoints.reranking import UNMEASURED
from bridgetower.checkpoints.tensors import extent
from bridgetower.files import differences
from bridgetower.model.config import (
    FEATURE_FIELDS,
    Activation,
    FusionConfig,
    HeadsConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from bridgetower.model.heads import HEADS
from bridgetower.plain import known_fields

_LINK_PARTS = r"LayerNorm\.(weight|bias)|scaled_factor|beta"
_DROPPABLE = (
    *(r".*\.position_ids", r".*\.token_type_ids"),
    rf"(bridgetower\.)?cross_modal_(text|image)_link_tower\.({_LINK_PARTS})",  # shared by no layers, if there is one
)
_WRITTEN: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "quick_gelu": "quick_gelu",
}
_ACTIVATIONS = _WRITTEN | {
    "gelu_python": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_ACTIVATION_NAMES = {ours: theirs for theirs, ours in _WRITTEN.items()}
_BACKBONE = "bridgetower."
_HEAD_WIDTH = 64  # of transformers' image tower
_LINK_TOWERS = ("add", "scaled_add", "interpolate")  # bridge kinds that transformers has
# Fields without one in transformers, whose values change outputs a little, or only training: they are lost.
_LOST = (
    "fusion.layer_norm_eps",
    "fusion.dropout",
    "fusion.attention_dropout",
    "heads.mlm_layer_norm_eps",
)
_READERS: dict[
    str, tuple[str, ...]
] = {  # fields of `HeadsConfig` that nothing reads without one of these heads
    **dict.fromkeys(("mlm_layer_norm_eps", "mlm_activation"), ("mlm",)),
    **dict.fromkeys(("itc_size", *FEATURE_FIELDS), ("itc",)),
    "hidden_scale": tuple(name for name, spec in HEADS.items() if spec.hidden_scale),
    "nlvr2_dropout": ("nlvr2",),
    "multi_label": ("classification",),
}
_ADVICE = {"heads.itc": "drop_itc=True leaves the contrastive head out"}
# Theirs to ours, of the text tower alone, and of its layers and the fusion layers, which share a field in transformers;
# in the official code the eps is 1e-5 in the text tower and 1e-12 in the fusion layers.
_TEXT_FIELDS = {"max_position_embeddings": "max_positions"} | {
    name: name for name in ("vocab_size", "hidden_size", "type_vocab_size", "pad_token_id")
}
_LAYER_FIELDS = {"num_attention_heads": "num_heads", "hidden_dropout_prob": "dropout"} | {
    name: name for name in ("intermediate_size", "layer_norm_eps")
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Section:
    """What is read of transformers' BridgeTowerConfig and its sections, with their defaults, which a file may omit."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu"
    vocab_size: int = 50265
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 514
    type_vocab_size: int = 1
    pad_token_id: int = 1
    patch_size: int | tuple[int, ...] = 16
    image_size: int | tuple[int, ...] = 288
    remove_last_layer: bool = False
    link_tower_type: str = "add"
    share_cross_modal_transformer_layers: bool = True
    share_link_tower_layers: bool = False
    tie_word_embeddings: bool = False
    contrastive_hidden_size: int = 512

    @classmethod
    def of(cls, values: object, where: str, num_hidden_layers: int = 12) -> _Section:
        if isinstance(values, Mapping):  # a section also holds, as null, fields of other models
            given = {name: value for name, value in values.items() if value is not None}
            values = {"num_hidden_layers": num_hidden_layers} | given
        return known_fields(cls, values, where)


def read_checkpoint(
    source: str,
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> Checkpoint:
    """Builds a checkpoint from transformers' `config.json` and tensors, in the number format `dtype` if it is given."""
    config, top, blocks = _read_config(source, values, tensors)
    prefix = _BACKBONE if any(name.startswith(_BACKBONE) for name in tensors) else ""
    decoder, words = (
        "mlm_score.decoder.weight",
        f"{prefix}text_model.embeddings.word_embeddings.weight",
    )
    if (
        top.tie_word_embeddings
        and "mlm_score.bias" in tensors
        and decoder not in tensors
        and words in tensors
    ):
        tensors = ChainMap({decoder: tensors[words].clone()}, tensors)  # type: ignore[arg-type]  # reads only
    check_depth(source, config, tensors)
    options: Any = {
        "separate_projections": config.fusion.separate_projections,
        "backbone_prefix": prefix,
    }
    table = name_table(parameter_shapes(config), "huggingface", **options)
    extra_table = name_table(
        extra_tensor_names(config, blocks - config.vision.num_layers), "huggingface", **options
    )
    return collect(source, config, tensors, table, extra_table, _DROPPABLE, dtype)


def export(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    values = _config_values(checkpoint)
    _refuse_changes(checkpoint, values)
    config = checkpoint.config
    text, fusion, heads = config.text, config.fusion, config.heads
    tensors = dict(checkpoint.tensors) | checkpoint.extra_tensors
    # transformers builds this pooler but never reads it
    if "text.pooler.dense.weight" not in tensors:
        tensors["text.pooler.dense.weight"] = torch.zeros(text.hidden_size, text.hidden_size)
        tensors["text.pooler.dense.bias"] = torch.zeros(text.hidden_size)
    prefix = _BACKBONE if heads.mlm or heads.itm or heads.itc else ""
    table = name_table(tensors, "huggingface", fusion.separate_projections, prefix)
    return values, export_tensors(table, tensors)


def _refuse_changes(checkpoint: Checkpoint, values: Mapping[str, Any]) -> None:
    """Reads a written config back and raises ValueError if the model became another one; logs what is lost."""
    config, source = checkpoint.config, checkpoint.source
    in_transformers = [f"{name}_head." for name, spec in HEADS.items() if spec.in_transformers]
    held = {
        name: value
        for name, value in checkpoint.tensors.items()
        if name.startswith(tuple(in_transformers))
    }
    try:
        back, _, _ = _read_config(
            source, values, export_tensors(name_table(held, "huggingface"), held)
        )
    except ValueError as error:
        raise ValueError(f"transformers cannot hold {source}: {error}") from error
    ours = _meaning(config)
    for field, readers in _READERS.items():
        if not any(ours["heads"][reader] for reader in readers):
            del ours["heads"][field]
    changes = list(differences(_meaning(back), ours))
    refused = [
        f"{name} is {own!r:.60}, there {theirs!r:.60}"
        for name, theirs, own in changes
        if name not in _LOST
    ]
    refused += [
        advice for name, advice in _ADVICE.items() if name in [change[0] for change in changes]
    ]
    # What transformers' config can say, but its model cannot run.
    width, fusion = config.vision.hidden_size, config.fusion
    if width < _HEAD_WIDTH:
        refused.append(f"vision.hidden_size is {width}, less than a head of {_HEAD_WIDTH}")
    # It spreads the token type over the image tower's width there, and calls one projection.
    if config.heads.itc == "fused" and width != fusion.hidden_size:
        refused.append(
            f"vision.hidden_size is {width}, but the contrastive head needs {fusion.hidden_size} as in fusion"
        )
    if config.heads.itc == "fused" and fusion.separate_projections:
        refused.append(
            "fusion.separate_projections is True, but the contrastive head needs a shared one"
        )
    if refused:
        raise ValueError(
            f"transformers cannot hold {source}: {'; '.join(refused)}; keep it as a folder of this package"
        )
    if checkpoint.reranking != UNMEASURED:
        changes.append(
            ("record of reranking", UNMEASURED.to_plain(), checkpoint.reranking.to_plain())
        )
    for name, theirs, own in changes:
        logger.warning(
            "%s: transformers has no field for %s: %s becomes %s", source, name, own, theirs
        )


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a config, with one spelling for values that mean the same."""
    values = config.to_dict()
    vision, text, fusion = values["vision"], values["text"], values["fusion"]
    fusion["vision_layers"], fusion["text_layers"] = config.vision_layers, config.text_layers
    vision["num_layers"] = config.vision_layers[-1]  # transformers does not reach what is above
    vision["prefix_tokens"] = config.vision.num_prefix_tokens
    for part in (text, fusion):
        if part["attention_dropout"] is None:
            part["attention_dropout"] = part["dropout"]
    return values


def _read_config(
    source: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[ModelConfig, _Section, int]:
    """Returns the config of a model, the top section of transformers' config, and the blocks of its image tower."""
    top = _Section.of(values, f"{source}/config.json", num_hidden_layers=6)
    text, vision = (
        _Section.of(values.get(name) or {}, f"{source}/config.json: {name}")
        for name in ("text_config", "vision_config")
    )
    blocks = vision.num_hidden_layers - vision.remove_last_layer
    return _model_config(source, top, text, vision, blocks, tensors), top, blocks


def _model_config(
    source: str,
    top: _Section,
    text: _Section,
    vision: _Section,
    blocks: int,
    tensors: Mapping[str, Tensor],
) -> ModelConfig:
    depth, fusion_depth, width = text.num_hidden_layers, top.num_hidden_layers, vision.hidden_size
    unknown, depths = (
        {text.hidden_act, top.hidden_act} - _ACTIVATIONS.keys(),
        (depth, fusion_depth, blocks),
    )
    refused = {
        "share_link_tower_layers is true": top.share_link_tower_layers and fusion_depth > 1,
        f"link_tower_type is {top.link_tower_type!r}": top.link_tower_type not in _LINK_TOWERS,
        f"hidden_act is {', '.join(sorted(unknown))}, not one of {', '.join(_ACTIVATIONS)}": bool(
            unknown
        ),
        f"hidden_size {top.hidden_size} differs from the text tower's": top.hidden_size
        != text.hidden_size,
        "the image tower is shallower than the text tower": blocks < depth,
        "one of its parts has less than 1 or more than 1000 layers": min(depths) < 1
        or max(depths) > 1_000,
    }
    if reasons := [reason for reason, applies in refused.items() if applies]:
        raise ValueError(
            f"{source}: config.json describes a model that is not supported: {'; '.join(reasons)}"
        )
    bridged = tuple(range(depth - fusion_depth + 1, depth + 1))
    itc, same_dropout = (
        "itc_text_head.fc.weight",
        text.attention_probs_dropout_prob == text.hidden_dropout_prob,
    )
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
            num_heads=max(width // _HEAD_WIDTH, 1),
            intermediate_size=4 * width,
            layer_norm_eps=vision.layer_norm_eps,
        ),
        text=TextConfig(
            num_layers=depth,
            **{ours: getattr(text, theirs) for theirs, ours in _TEXT_FIELDS.items()},
            **shared,
        ),
        fusion=FusionConfig(
            hidden_size=top.hidden_size,
            num_layers=fusion_depth,
            bridge=top.link_tower_type,
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


def _config_values(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    vision, text, fusion, heads = config.vision, config.text, config.fusion, config.heads
    layers, norms = (
        len(
            {
                name.split(".")[2]
                for name in checkpoint.extra_tensors
                if name.startswith(f"vision.{kind}.")
            }
        )
        for kind in ("layers", "separate_norms")
    )
    blocks = max(vision.num_layers + layers, text.num_layers)
    architectures = {
        "BridgeTowerForContrastiveLearning": heads.itc,
        "BridgeTowerForMaskedLM": heads.mlm,
        "BridgeTowerForImageAndTextRetrieval": heads.itm,
        "BridgeTowerModel": True,
    }
    return {
        "model_type": "bridgetower",
        "architectures": [next(name for name, present in architectures.items() if present)],
        "hidden_size": text.hidden_size,  # of both
        "num_hidden_layers": fusion.num_layers,
        "num_attention_heads": text.num_heads,
        "layer_norm_eps": fusion.bridge_layer_norm_eps,
        "hidden_act": _ACTIVATION_NAMES[heads.mlm_activation],
        "link_tower_type": fusion.bridge if fusion.bridge in _LINK_TOWERS else _LINK_TOWERS[0],
        "share_cross_modal_transformer_layers": not fusion.separate_projections,
        "share_link_tower_layers": False,
        "tie_word_embeddings": False,
        "contrastive_hidden_size": heads.itc_size,
        "logit_scale_init_value": 2.6592,
        "text_config": {
            **{
                theirs: getattr(text, ours)
                for theirs, ours in (_TEXT_FIELDS | _LAYER_FIELDS).items()
            },
            "num_hidden_layers": text.num_layers,
            "hidden_act": _ACTIVATION_NAMES[text.activation],
            "attention_probs_dropout_prob": text.dropout
            if text.attention_dropout is None
            else text.attention_dropout,
        },
        "vision_config": {
            **{
                name: getattr(vision, name)
                for name in ("hidden_size", "patch_size", "image_size", "layer_norm_eps")
            },
            "num_hidden_layers": max(blocks, norms),
            "remove_last_layer": norms > blocks,  # they are made for the removed layer, too
            "share_layernorm": not norms,
        },
    }
