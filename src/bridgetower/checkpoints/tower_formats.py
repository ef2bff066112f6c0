"""Towers as OpenAI, timm and transformers publish them: names of tensors, how each is recognised, and its settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from bridgetower.checkpoints.keymap import (
    CLIP_RULES,
    HUGGINGFACE_EMBEDDINGS,
    TEXT_RULES,
    TIMM_LEADING_ONES,
    TIMM_RULES,
    Rule,
    Source,
    block,
    inside,
    rule_table,
)
from bridgetower.processor.huggingface import channels, read_normalisation

Kind = Literal["openai", "timm", "clip", "vit", "bert"]
Values = Mapping[str, Any]
Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]

# Per width, of timm's ViT and DeiT, of RoBERTa and BERT.
PUBLISHED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}

MODEL_TYPES: dict[Kind, tuple[str, ...]] = {
    "clip": ("clip", "clip_vision_model"),
    "vit": ("vit", "deit"),
    "bert": ("roberta", "bert"),
}


@dataclass(frozen=True, kw_only=True)
class TowerNaming:
    """How one publisher names the tensors of a tower.

    Attributes:
        kind: Short name; the last three are transformers', and `bert` stands for RoBERTa too.
        part: The tower that it is.
        prefix: In front of every name of the tower.
        marker: A name, after the prefix, that tells this kind from the others.
        rules: Our names to the publisher's.
        droppable: Patterns of names that stand beside the tower: other towers, heads, buffers.
        leading_ones: Dimensions of size 1 in front of the publisher's tensors, by our name.
    """

    kind: Kind
    part: Literal["vision", "text"]
    prefix: str
    marker: str
    rules: Iterable[Rule]
    droppable: tuple[str, ...]
    leading_ones: Mapping[str, int] = field(default_factory=dict)

    def table(self, names: Iterable[str]) -> dict[str, Source]:
        """Returns where each of our tensors is found."""
        return rule_table(names, self.rules, {"VISION.": self.prefix, "TEXT.": self.prefix}, self.leading_ones)

    def find(self, tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
        """Returns the publisher's tensor (the first of them) for one of our names, None if it is not there."""
        return tensors.get(self.table([name])[name].names[0])


_CLIP = [
    *HUGGINGFACE_EMBEDDINGS,
    (r"vision\.pre_norm\.(\w+)", ("VISION.pre_layrnorm.{0}",)),
    (r"vision\.post_norm\.(\w+)", ("VISION.post_layernorm.{0}",)),
]
_CLIP_LAYER = block(
    attention_norm="layer_norm1.{0}",
    qkv=("self_attn.q_proj.{0}", "self_attn.k_proj.{0}", "self_attn.v_proj.{0}"),
    out="self_attn.out_proj.{0}",
    mlp_norm="layer_norm2.{0}",
    up="mlp.fc1.{0}",
    down="mlp.fc2.{0}",
)
_VIT = [
    (r"vision\.patch_embedding\.(\w+)", ("VISION.embeddings.patch_embeddings.projection.{0}",)),
    (r"vision\.class_embedding", ("VISION.embeddings.cls_token",)),
    (r"vision\.distillation_embedding", ("VISION.embeddings.distillation_token",)),
    (r"vision\.position_embedding", ("VISION.embeddings.position_embeddings",)),
    (r"vision\.post_norm\.(\w+)", ("VISION.layernorm.{0}",)),
]
_VIT_LAYER = block(
    attention_norm="layernorm_before.{0}",
    qkv=("attention.attention.query.{0}", "attention.attention.key.{0}", "attention.attention.value.{0}"),
    out="attention.output.dense.{0}",
    mlp_norm="layernorm_after.{0}",
    up="intermediate.dense.{0}",
    down="output.dense.{0}",
)

_OPENAI = TowerNaming(
    kind="openai",
    part="vision",
    prefix="visual.",
    marker="class_embedding",
    rules=CLIP_RULES,
    droppable=(
        r"visual\.proj",
        r"positional_embedding|text_projection|logit_scale|input_resolution|context_length|vocab_size",
        r"(transformer|token_embedding|ln_final)\..*",
    ),
)
_TIMM = TowerNaming(
    kind="timm",
    part="vision",
    prefix="",
    marker="patch_embed.proj.weight",
    rules=TIMM_RULES,
    droppable=(r"(head|head_dist|pre_logits)\..*",),
    leading_ones=TIMM_LEADING_ONES,
)


def _clip(prefix: str) -> TowerNaming:
    return TowerNaming(
        kind="clip",
        part="vision",
        prefix=prefix,
        marker="embeddings.class_embedding",
        rules=[*_CLIP, *inside(r"vision\.layers\.(\d+)\.", "VISION.encoder.layers.{0}.", _CLIP_LAYER)],
        droppable=(
            r"text_model\..*",
            r"(visual|text)_projection\.weight|logit_scale",
            r"classifier\..*",
            rf"{prefix}embeddings\.position_ids",
        ),
    )


def _vit(prefix: str) -> TowerNaming:
    return TowerNaming(
        kind="vit",
        part="vision",
        prefix=prefix,
        marker="embeddings.cls_token",
        rules=[*_VIT, *inside(r"vision\.layers\.(\d+)\.", "VISION.encoder.layer.{0}.", _VIT_LAYER)],
        droppable=(
            rf"{prefix}pooler\..*",
            r"(cls_|distillation_)?classifier\..*",
            rf"decoder\..*|{prefix}embeddings\.mask_token",
        ),
        leading_ones=TIMM_LEADING_ONES,
    )


def _bert(prefix: str) -> TowerNaming:
    return TowerNaming(
        kind="bert",
        part="text",
        prefix=prefix,
        marker="embeddings.word_embeddings.weight",
        rules=TEXT_RULES,
        droppable=(
            rf"{prefix}pooler\..*",
            rf"{prefix}embeddings\.(position_ids|token_type_ids)",
            # Official: the MLM head starts anew, so those of RoBERTa and BERT are not read either.
            r"(lm_head|cls|classifier|qa_outputs)\..*",
        ),
    )


NAMINGS = (
    _OPENAI,
    _TIMM,
    *map(_clip, ("vision_model.", "")),
    *map(_vit, ("vit.", "deit.", "")),
    *map(_bert, ("roberta.", "bert.", "")),
)


def recognise(tensors: Mapping[str, Tensor], part: Literal["vision", "text"]) -> TowerNaming | None:
    """Returns the naming of the tower that a file holds, None if it holds no known one."""
    known = (naming for naming in NAMINGS if naming.part == part)
    return next((naming for naming in known if naming.prefix + naming.marker in tensors), None)


def vision_settings(source: str, kind: Kind, values: Values, width: int) -> tuple[Values, Values]:
    """Returns fields of `VisionConfig` from config.json and, apart, the defaults of the kind where there is none."""
    if kind == "openai":  # its code takes the heads from the width
        return {}, {"num_heads": max(width // 64, 1), "activation": "quick_gelu", "layer_norm_eps": 1e-5}
    if kind == "timm":
        heads = {"num_heads": PUBLISHED_HEADS[width]} if width in PUBLISHED_HEADS else {}
        return {}, {**heads, "activation": "gelu", "layer_norm_eps": 1e-6}
    _check_model_type(source, kind, values)
    if kind == "clip":
        nested = values.get("vision_config")
        values = nested if isinstance(nested, dict) else values
        from_config = {"activation": values.get("hidden_act", "quick_gelu"), "layer_norm_eps": 1e-5}
        _check_value(source, "hidden_act", from_config["activation"], ("quick_gelu", "gelu"))
    else:
        from_config = {"activation": "gelu", "layer_norm_eps": 1e-12}
        _check_value(source, "hidden_act", values.get("hidden_act", "gelu"), ("gelu",))
    return from_config | _heads_and_epsilon(values), {}


def text_settings(source: str, values: Values) -> dict[str, Any]:
    """Returns the fields of `TextConfig` that tensors do not show, except dropout."""
    _check_model_type(source, "bert", values)
    _check_value(source, "hidden_act", values.get("hidden_act", "gelu"), ("gelu",))
    _check_value(source, "position_embedding_type", values.get("position_embedding_type", "absolute"), ("absolute",))
    roberta = values["model_type"] == "roberta"
    from_config = {"positions": "roberta" if roberta else "bert", "layer_norm_eps": 1e-12}
    return from_config | _heads_and_epsilon(values) | {"pad_token_id": values.get("pad_token_id", 1 if roberta else 0)}


def normalisation(folder: Path, values: Values) -> Normalisation | None:
    """Returns the mean and standard deviation of pixels that a folder of transformers or timm tells."""
    timm = values.get("pretrained_cfg")
    if isinstance(timm, dict) and {"mean", "std"} <= set(timm):
        return channels(folder, "mean", timm["mean"]), channels(folder, "std", timm["std"])
    return read_normalisation(folder)


def _heads_and_epsilon(values: Values) -> dict[str, Any]:
    """Heads and epsilon of a transformers config, which may leave its defaults out."""
    from_config = {"num_heads": values.get("num_attention_heads", 12)}
    return from_config | ({"layer_norm_eps": values["layer_norm_eps"]} if "layer_norm_eps" in values else {})


def _check_model_type(source: str, kind: Kind, values: Values) -> None:
    if not values:
        raise ValueError(f"{source} comes without its config.json, which tells heads and epsilon; pass its folder")
    _check_value(source, "model_type", values.get("model_type"), MODEL_TYPES[kind])


def _check_value(source: str, name: str, value: Any, expected: tuple[str, ...]) -> None:
    if value not in expected:
        raise ValueError(f"{source}/config.json sets {name} to {value!r}; expected {' or '.join(map(repr, expected))}")
