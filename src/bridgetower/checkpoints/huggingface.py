"""Configs and tensor names of transformers' BridgeTower, read and written."""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
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
    ModelConfig,
)
from bridgetower.model.heads import HEADS
from bridgetower.plain import known_fields

_LINK_TOWER = r"(bridgetower\.)?cross_modal_(text|image)_link_tower\."
_DROPPABLE = (
    r".*\.(position_ids|token_type_ids)",
    # A link tower that layers would share, for which one layer is too few.
    _LINK_TOWER + r"(LayerNorm\.(weight|bias)|scaled_factor|beta)",
)
_WRITTEN_ACTIVATIONS: dict[Activation, str] = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "relu": "relu",
    "quick_gelu": "quick_gelu",
}
_ACTIVATIONS: dict[str, Activation] = {
    **{theirs: ours for ours, theirs in _WRITTEN_ACTIVATIONS.items()},
    "gelu_python": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_BACKBONE = "bridgetower."
_HEAD_WIDTH = 64  # of transformers' image tower
_LINK_TOWER_TYPES = ("add", "scaled_add", "interpolate")  # bridges that transformers has
# Fields that transformers lacks. They change outputs a little, or only training, so an export may lose them.
_LOST = (
    "fusion.layer_norm_eps",
    "fusion.dropout",
    "fusion.attention_dropout",
    "heads.mlm_layer_norm_eps",
)
# Fields of `HeadsConfig` that matter only with one of these heads.
_HEADS_OF_FIELDS: dict[str, tuple[str, ...]] = {
    "mlm_layer_norm_eps": ("mlm",),
    "mlm_activation": ("mlm",),
    **dict.fromkeys(("itc_size", *FEATURE_FIELDS), ("itc",)),
    "hidden_scale": tuple(name for name, spec in HEADS.items() if spec.hidden_scale),
    "nlvr2_dropout": ("nlvr2",),
    "multi_label": ("classification",),
}
# Fields of transformers' config, and ours with the same values; the first of ours is written. Fusion layers are built
# from the text config there. In the official code, eps is 1e-5 in the text tower and 1e-12 in the fusion layers.
_FIELDS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("text.hidden_size", "fusion.hidden_size"),
    "num_hidden_layers": ("fusion.num_layers",),
    "layer_norm_eps": ("fusion.bridge_layer_norm_eps", "heads.mlm_layer_norm_eps"),
    "contrastive_hidden_size": ("heads.itc_size",),
    "text_config.hidden_size": ("text.hidden_size",),
    "text_config.num_hidden_layers": ("text.num_layers", "vision.num_layers"),
    "text_config.num_attention_heads": ("text.num_heads", "fusion.num_heads"),
    "text_config.intermediate_size": ("text.intermediate_size", "fusion.intermediate_size"),
    "text_config.layer_norm_eps": ("text.layer_norm_eps", "fusion.layer_norm_eps"),
    "text_config.hidden_dropout_prob": ("text.dropout", "fusion.dropout"),
    "text_config.vocab_size": ("text.vocab_size",),
    "text_config.max_position_embeddings": ("text.max_positions",),
    "text_config.type_vocab_size": ("text.type_vocab_size",),
    "text_config.pad_token_id": ("text.pad_token_id",),
    "vision_config.hidden_size": ("vision.hidden_size",),
    "vision_config.patch_size": ("vision.patch_size",),
    "vision_config.image_size": ("vision.image_size",),
    "vision_config.layer_norm_eps": ("vision.layer_norm_eps",),
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Section:
    """The fields of transformers' BridgeTowerConfig and its sections that are read, with their defaults."""

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
        # A section has fields of other models too, as null.
        if isinstance(values, Mapping):
            values = {name: value for name, value in values.items() if value is not None}
            values = {"num_hidden_layers": num_hidden_layers} | values
        section = known_fields(cls, values, where)
        sides: dict[str, Any] = {}
        for name in ("patch_size", "image_size"):
            size = getattr(section, name)
            lengths = {size} if isinstance(size, int) else set(size)
            if len(lengths) != 1:
                raise ValueError(f"image or patch size {size} is not square; expected equal sides")
            sides[name] = lengths.pop()
        return replace(section, **sides)

    @property
    def num_blocks(self) -> int:
        """Layers of the image tower."""
        return self.num_hidden_layers - self.remove_last_layer


@dataclass(frozen=True)
class _Sections:
    top: _Section
    text_config: _Section
    vision_config: _Section

    @classmethod
    def of(cls, source: str, values: Mapping[str, Any]) -> _Sections:
        where = f"{source}/config.json"
        return cls(
            _Section.of(values, where, num_hidden_layers=6),
            _Section.of(values.get("text_config") or {}, f"{where}: text_config"),
            _Section.of(values.get("vision_config") or {}, f"{where}: vision_config"),
        )

    def unsupported(self) -> list[str]:
        """Returns the reasons why this package cannot build the model."""
        top = self.top
        text = self.text_config
        blocks = self.vision_config.num_blocks
        depths = (text.num_hidden_layers, top.num_hidden_layers, blocks)
        unknown = sorted({text.hidden_act, top.hidden_act} - _ACTIVATIONS.keys())
        reasons = []
        if top.share_link_tower_layers and top.num_hidden_layers > 1:
            reasons.append("share_link_tower_layers is true")
        if top.link_tower_type not in _LINK_TOWER_TYPES:
            reasons.append(f"link_tower_type is {top.link_tower_type!r}")
        if unknown:
            activations = ", ".join(_ACTIVATIONS)
            reasons.append(f"hidden_act is {', '.join(unknown)}, not one of {activations}")
        if top.hidden_size != text.hidden_size:
            reasons.append(f"hidden_size {top.hidden_size} differs from the text tower's")
        if blocks < text.num_hidden_layers:
            reasons.append("the image tower is shallower than the text tower")
        if min(depths) < 1 or max(depths) > 1_000:
            reasons.append("one of its parts has less than 1 or more than 1000 layers")
        return reasons


def read_hf_checkpoint(
    source: str,
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> Checkpoint:
    """Builds a checkpoint from transformers' `config.json` and tensors, in the number format `dtype` if it is given."""
    sections = _Sections.of(source, values)
    config = _import_config(source, sections, tensors)
    prefix = _BACKBONE if any(name.startswith(_BACKBONE) for name in tensors) else ""

    # The masked-word head may share the weights of the word embeddings.
    decoder = "mlm_score.decoder.weight"
    words = f"{prefix}text_model.embeddings.word_embeddings.weight"
    is_tied = sections.top.tie_word_embeddings and config.heads.mlm
    if is_tied and decoder not in tensors and words in tensors:
        # A ChainMap only asks for a mutable mapping to write to it.
        tensors = ChainMap({decoder: tensors[words].clone()}, tensors)  # type: ignore[arg-type]

    check_depth(source, config, tensors)
    unread_blocks = sections.vision_config.num_blocks - config.vision.num_layers
    separate = config.fusion.separate_projections
    table = name_table(parameter_shapes(config), "huggingface", separate, prefix)
    extra_names = extra_tensor_names(config, unread_blocks)
    extra_table = name_table(extra_names, "huggingface", separate, prefix)
    return collect(source, config, tensors, table, extra_table, _DROPPABLE, dtype)


def export(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns transformers' config and tensors of a checkpoint.

    Raises:
        ValueError: transformers cannot hold the model.
    """
    values = _export_config(checkpoint)
    _refuse_changes(checkpoint, values)
    config = checkpoint.config
    tensors = checkpoint.tensors | checkpoint.extra_tensors
    # transformers builds this pooler but never reads it.
    if "text.pooler.dense.weight" not in tensors:
        width = config.text.hidden_size
        tensors["text.pooler.dense.weight"] = torch.zeros(width, width)
        tensors["text.pooler.dense.bias"] = torch.zeros(width)
    prefix = "" if values["architectures"] == ["BridgeTowerModel"] else _BACKBONE
    table = name_table(tensors, "huggingface", config.fusion.separate_projections, prefix)
    return values, export_tensors(table, tensors)


def _refuse_changes(checkpoint: Checkpoint, values: Mapping[str, Any]) -> None:
    """Raises ValueError if a written config, read back, is of another model, and logs fields that are lost."""
    # Read the config back, with the heads that transformers has.
    config = checkpoint.config
    source = checkpoint.source
    prefixes = tuple(f"{name}_head." for name, spec in HEADS.items() if spec.in_transformers)
    heads = {
        name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith(prefixes)
    }
    try:
        head_tensors = export_tensors(name_table(heads, "huggingface"), heads)
        read_back = _import_config(source, _Sections.of(source, values), head_tensors)
    except ValueError as error:
        raise ValueError(f"transformers cannot hold {source}: {error}") from error

    # Refuse all changes but those that matter little or to no head of the model.
    before = _normalised(config)
    for field, readers in _HEADS_OF_FIELDS.items():
        if not any(before["heads"][reader] for reader in readers):
            del before["heads"][field]
    changes = list(differences(_normalised(read_back), before))
    refused = [
        f"{name} is {ours!r:.60}, there {theirs!r:.60}"
        for name, theirs, ours in changes
        if name not in _LOST
    ]
    if any(name == "heads.itc" for name, _, _ in changes):
        refused.append("drop_itc=True leaves the contrastive head out")

    # Refuse values that transformers' config can hold, but its model cannot run.
    width = config.vision.hidden_size
    if width < _HEAD_WIDTH:
        refused.append(f"vision.hidden_size is {width}, less than a head of {_HEAD_WIDTH}")
    if config.heads.itc == "fused":
        # It spreads the token type over the image tower's width there, and calls one projection.
        if width != config.fusion.hidden_size:
            refused.append(
                f"vision.hidden_size is {width}, but the contrastive head needs {config.fusion.hidden_size} as in "
                "fusion"
            )
        if config.fusion.separate_projections:
            refused.append(
                "fusion.separate_projections is True, but the contrastive head needs a shared one"
            )
    if refused:
        raise ValueError(
            f"transformers cannot hold {source}: {'; '.join(refused)}; keep it as a folder of this package"
        )

    # Name all that is lost.
    if checkpoint.reranking != UNMEASURED:
        record = checkpoint.reranking.to_plain()
        changes.append(("record of reranking", UNMEASURED.to_plain(), record))
    for name, theirs, ours in changes:
        logger.warning(
            "%s: transformers has no field for %s: %s becomes %s", source, name, ours, theirs
        )


def _normalised(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a config, with one spelling for values that mean the same."""
    values = config.to_dict()
    values["fusion"]["vision_layers"] = config.vision_layers
    values["fusion"]["text_layers"] = config.text_layers
    # transformers does not reach the layers above.
    values["vision"]["num_layers"] = config.vision_layers[-1]
    values["vision"]["prefix_tokens"] = config.vision.num_prefix_tokens
    for section in (values["text"], values["fusion"]):
        if section["attention_dropout"] is None:
            section["attention_dropout"] = section["dropout"]
    return values


def _import_config(source: str, sections: _Sections, tensors: Mapping[str, Tensor]) -> ModelConfig:
    top = sections.top
    text = sections.text_config
    if reasons := sections.unsupported():
        raise ValueError(
            f"{source}: config.json describes a model that is not supported: {'; '.join(reasons)}"
        )

    # Take over what has a field of ours.
    values: dict[str, Any] = {}
    for theirs, fields in _FIELDS.items():
        path = theirs if "." in theirs else f"top.{theirs}"
        value = attrgetter(path)(sections)
        values |= dict.fromkeys(fields, value)

    # Both towers are walked together there, and deeper blocks of the image tower are never reached.
    depth = text.num_hidden_layers
    bridged = tuple(range(depth - top.num_hidden_layers + 1, depth + 1))
    width = sections.vision_config.hidden_size
    attention_dropout = text.attention_probs_dropout_prob
    for section in ("text", "fusion"):
        values[f"{section}.activation"] = _ACTIVATIONS[text.hidden_act]
        if attention_dropout != text.hidden_dropout_prob:
            values[f"{section}.attention_dropout"] = attention_dropout
    itc = "itc_text_head.fc.weight"
    if itc in tensors:
        values["heads.itc_size"] = extent(tensors, itc)
    values |= {
        "vision.num_heads": max(width // _HEAD_WIDTH, 1),
        "vision.intermediate_size": 4 * width,
        "fusion.bridge": top.link_tower_type,
        "fusion.vision_layers": bridged,
        "fusion.text_layers": bridged,
        "fusion.separate_projections": not top.share_cross_modal_transformer_layers,
        "heads.mlm": "mlm_score.bias" in tensors,
        "heads.itm": "itm_score.fc.weight" in tensors,
        "heads.itc": "fused" if "itc_cross_modal_head.fc.weight" in tensors else None,
        "heads.mlm_activation": _ACTIVATIONS[top.hidden_act],
    }
    return ModelConfig().override(values)


def _export_config(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    text = config.text
    fusion = config.fusion
    heads = config.heads
    architecture = "BridgeTowerModel"
    if heads.itc:
        architecture = "BridgeTowerForContrastiveLearning"
    elif heads.mlm:
        architecture = "BridgeTowerForMaskedLM"
    elif heads.itm:
        architecture = "BridgeTowerForImageAndTextRetrieval"
    values: dict[str, Any] = {
        "model_type": "bridgetower",
        "architectures": [architecture],
        "num_attention_heads": text.num_heads,
        "hidden_act": _WRITTEN_ACTIVATIONS[heads.mlm_activation],
        "link_tower_type": fusion.bridge if fusion.bridge in _LINK_TOWER_TYPES else "add",
        "share_cross_modal_transformer_layers": not fusion.separate_projections,
        "share_link_tower_layers": False,
        "tie_word_embeddings": False,
        "logit_scale_init_value": 2.6592,
        "text_config": {},
        "vision_config": {},
    }
    for theirs, fields in _FIELDS.items():
        section, _, name = theirs.rpartition(".")
        target = values[section] if section else values
        target[name] = attrgetter(fields[0])(config)
    attention_dropout = text.attention_dropout
    if attention_dropout is None:
        attention_dropout = text.dropout
    values["text_config"]["hidden_act"] = _WRITTEN_ACTIVATIONS[text.activation]
    values["text_config"]["attention_probs_dropout_prob"] = attention_dropout

    # The image tower may have blocks `vision.layers.N` and norms `vision.separate_norms.N` that no computation reads,
    # with a norm of a removed layer.
    modules = {tuple(name.split(".")[1:3]) for name in checkpoint.extra_tensors}
    kinds = [kind for kind, _ in modules]
    norms = kinds.count("separate_norms")
    blocks = max(config.vision.num_layers + kinds.count("layers"), text.num_layers)
    values["vision_config"] |= {
        "num_hidden_layers": max(blocks, norms),
        "remove_last_layer": norms > blocks,
        "share_layernorm": not norms,
    }
    return values
