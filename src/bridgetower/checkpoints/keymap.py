"""Names of the same tensor in this package, in the official code and in transformers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bridgetower.model.heads import HEADS
from bridgetower.processor.huggingface import channels, read_normalisation

Naming = Literal["clip", "timm", "huggingface"]
Rule = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Source:
    """Where one of our tensors comes from.

    Attributes:
        names: Foreign tensors that are stacked along dimension 0: query, key and value are one matrix here.
        leading_ones: Dimensions of size 1 that the foreign tensor has in front.
    """

    names: tuple[str, ...]
    leading_ones: int = 0

    def foreign_shape(self, shape: torch.Size) -> torch.Size:
        """Returns the shape of each foreign tensor, from that of ours."""
        part = shape if len(self.names) == 1 else (shape[0] // len(self.names), *shape[1:])
        return torch.Size((1,) * self.leading_ones + tuple(part))


def block(attention_norm: str, qkv: str | tuple[str, ...], out: str, mlp_norm: str, up: str, down: str) -> list[Rule]:
    """Returns the rules of a transformer layer, from the foreign name of each of its modules; `qkv` may be three."""
    return [
        (r"attention_norm\.(\w+)", (attention_norm,)),
        (r"attention\.qkv\.(\w+)", (qkv,) if isinstance(qkv, str) else qkv),
        (r"attention\.out\.(\w+)", (out,)),
        (r"mlp_norm\.(\w+)", (mlp_norm,)),
        (r"mlp\.up\.(\w+)", (up,)),
        (r"mlp\.down\.(\w+)", (down,)),
    ]


# Our name -> foreign names; "{0}", "{1}" are the groups of the pattern. First match wins.
# Prefixes: TEXT is the text tower, VISION the image tower, MODEL everything else of the backbone.
_BERT_LAYER = block(
    attention_norm="attention.output.LayerNorm.{0}",
    qkv=("attention.self.query.{0}", "attention.self.key.{0}", "attention.self.value.{0}"),
    out="attention.output.dense.{0}",
    mlp_norm="output.LayerNorm.{0}",
    up="intermediate.dense.{0}",
    down="output.dense.{0}",
)
_FUSION_LAYER = [
    (r"cross_attention\.query\.(\w+)", ("crossattention.self.query.{0}",)),
    (r"cross_attention\.key_value\.(\w+)", ("crossattention.self.key.{0}", "crossattention.self.value.{0}")),
    (r"cross_attention\.out\.(\w+)", ("crossattention.output.dense.{0}",)),
    (r"cross_attention_norm\.(\w+)", ("crossattention.output.LayerNorm.{0}",)),
    *((pattern.replace("attention", "self_attention", 1), names) for pattern, names in _BERT_LAYER[:3]),
    *_BERT_LAYER[3:],
]
_TEXT = [
    (r"text\.word_embedding\.weight", ("TEXT.embeddings.word_embeddings.weight",)),
    (r"text\.position_embedding\.weight", ("TEXT.embeddings.position_embeddings.weight",)),
    (r"text\.token_type_embedding\.weight", ("TEXT.embeddings.token_type_embeddings.weight",)),
    (r"text\.embedding_norm\.(\w+)", ("TEXT.embeddings.LayerNorm.{0}",)),
    (r"text\.pooler\.(.+)", ("TEXT.pooler.{0}",)),
]
_CLIP_BLOCK = block("ln_1.{0}", "attn.in_proj_{0}", "attn.out_proj.{0}", "ln_2.{0}", "mlp.c_fc.{0}", "mlp.c_proj.{0}")
_CLIP = [
    (r"vision\.pre_norm\.(\w+)", ("VISION.ln_pre.{0}",)),
    (r"vision\.post_norm\.(\w+)", ("VISION.ln_post.{0}",)),
    (r"vision\.separate_norms\.(\d+)\.(\w+)", ("VISION.ln_separate.{0}.{1}",)),
]
_CLIP_EMBEDDINGS = [
    (r"vision\.patch_embedding\.weight", ("VISION.conv1.weight",)),
    (r"vision\.class_embedding", ("VISION.class_embedding",)),
    (r"vision\.position_embedding", ("VISION.positional_embedding",)),
]
HUGGINGFACE_EMBEDDINGS = [
    (r"vision\.patch_embedding\.weight", ("VISION.embeddings.patch_embedding.weight",)),
    (r"vision\.class_embedding", ("VISION.embeddings.class_embedding",)),
    (r"vision\.position_embedding", ("VISION.embeddings.position_embedding.weight",)),
]
_TIMM_BLOCK = block("norm1.{0}", "attn.qkv.{0}", "attn.proj.{0}", "norm2.{0}", "mlp.fc1.{0}", "mlp.fc2.{0}")
_TIMM = [
    (r"vision\.patch_embedding\.(\w+)", ("VISION.patch_embed.proj.{0}",)),
    (r"vision\.class_embedding", ("VISION.cls_token",)),
    (r"vision\.distillation_embedding", ("VISION.dist_token",)),
    (r"vision\.position_embedding", ("VISION.pos_embed",)),
    (r"vision\.post_norm\.(\w+)", ("VISION.norm.{0}",)),
]
TIMM_LEADING_ONES = {"vision.class_embedding": 2, "vision.distillation_embedding": 2, "vision.position_embedding": 1}
_FUSION = [
    (r"token_type_embedding\.weight", ("MODEL.token_type_embeddings.weight",)),
    (r"fusion\.(text|image)_norm\.(\w+)", ("MODEL.cross_modal_{0}_layernorm.{1}",)),
    (r"fusion\.(text|image)_bridges\.(\d+)\.norm\.(\w+)", ("MODEL.cross_modal_{0}_link_tower.{1}.LayerNorm.{2}",)),
    (r"fusion\.(text|image)_bridges\.(\d+)\.scale", ("MODEL.cross_modal_{0}_link_tower.{1}.scaled_factor",)),
    (r"fusion\.(text|image)_bridges\.(\d+)\.beta", ("MODEL.cross_modal_{0}_link_tower.{1}.beta",)),
    # Managers as `microsoft` splits those of ManagerTower's files; their modules have our names there.
    (
        r"fusion\.(text|image)_bridges\.(\d+)\.((?:norms|stream|other|query|key|scores|weights|temperature)\S*)",
        ("MODEL.cross_modal_{0}_manager_tower.{1}.{2}",),
    ),
    (r"(text|image)_layer_embedding\.weight", ("MODEL.layer_embeddings_{0}.weight",)),
    (r"(text|image)_pooler\.(.+)", ("MODEL.cross_modal_{0}_pooler.{1}",)),
]
_SHARED_PROJECTIONS = [(r"(text|image)_projections\.0\.(\w+)", ("MODEL.cross_modal_{0}_transform.{1}",))]
_SEPARATE_PROJECTIONS = [(r"(text|image)_projections\.(\d+)\.(\w+)", ("MODEL.cross_modal_{0}_transform.{1}.{2}",))]
_HEADS = [
    (rf"{head}_head\.{re.escape(ours)}((?:\.\w+)*)", (theirs + "{0}",))
    for head, spec in HEADS.items()
    for ours, theirs in spec.published.items()
]


def inside(prefix: str, foreign: str, rules: Iterable[Rule]) -> list[Rule]:
    """Moves a layer's rules under a prefix whose groups come first."""
    groups = re.compile(prefix).groups
    shift = {f"{{{index}}}": f"{{{index + groups}}}" for index in range(2)}
    return [
        (prefix + pattern, tuple(foreign + re.sub(r"\{\d\}", lambda found: shift[found[0]], name) for name in names))
        for pattern, names in rules
    ]


_FUSION_LAYERS = inside(r"fusion\.(text|image)_layers\.(\d+)\.", "MODEL.cross_modal_{0}_layers.{1}.", _FUSION_LAYER)
_CLIP_LAYERS = inside(r"vision\.layers\.(\d+)\.", "VISION.transformer.resblocks.{0}.", _CLIP_BLOCK)
TEXT_RULES = [*_TEXT, *inside(r"text\.layers\.(\d+)\.", "TEXT.encoder.layer.{0}.", _BERT_LAYER)]
CLIP_RULES = [*_CLIP_EMBEDDINGS, *_CLIP, *_CLIP_LAYERS]
TIMM_RULES = [*_TIMM, *inside(r"vision\.layers\.(\d+)\.", "VISION.blocks.{0}.", _TIMM_BLOCK)]
_COMMON = [*TEXT_RULES, *_FUSION, *_FUSION_LAYERS, *_HEADS]
_RULES: dict[Naming, list[Rule]] = {
    "clip": [*CLIP_RULES, *_COMMON],
    "timm": [*TIMM_RULES, *_COMMON],
    "huggingface": [*HUGGINGFACE_EMBEDDINGS, *_CLIP, *_CLIP_LAYERS, *_COMMON],
}
_PREFIXES: dict[Naming, dict[str, str]] = {
    "clip": {"TEXT.": "text_transformer.", "VISION.": "vit_model.visual.", "MODEL.": ""},
    "timm": {"TEXT.": "text_transformer.", "VISION.": "vit_model.", "MODEL.": ""},
    "huggingface": {"TEXT.": "text_model.", "VISION.": "vision_model.visual.", "MODEL.": ""},
}


def name_table(
    names: Iterable[str], naming: Naming, *, separate_projections: bool = False, backbone_prefix: str = ""
) -> dict[str, Source]:
    """Returns where each of our tensors is found under a foreign naming."""
    projections = _SEPARATE_PROJECTIONS if separate_projections else _SHARED_PROJECTIONS
    prefixes = {placeholder: backbone_prefix + prefix for placeholder, prefix in _PREFIXES[naming].items()}
    return rule_table(names, [*projections, *_RULES[naming]], prefixes, TIMM_LEADING_ONES if naming == "timm" else {})


def rule_table(
    names: Iterable[str], rules: Iterable[Rule], prefixes: Mapping[str, str], leading_ones: Mapping[str, int]
) -> dict[str, Source]:
    """Returns where each of our tensors is found under the names that rules give."""
    compiled = [(re.compile(pattern), templates) for pattern, templates in rules]
    table = {}
    for name in names:
        found = ((match, templates) for pattern, templates in compiled if (match := pattern.fullmatch(name)))
        match, templates = next(found, (None, ()))
        if match is None:
            raise KeyError(f"no foreign name is known for {name}")
        foreign = [template.format(*match.groups()) for template in templates]
        for place, prefix in prefixes.items():
            foreign = [prefix + each.removeprefix(place) if each.startswith(place) else each for each in foreign]
        table[name] = Source(tuple(foreign), leading_ones.get(name, 0))
    return table


def import_tensors(
    table: Mapping[str, Source], tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Collects our tensors from foreign ones."""
    gathered = {}
    # Joined ones first: their sources can then leave memory, while the others may stay mapped from the file.
    for name, source in sorted(table.items(), key=lambda entry: len(entry[1].names), reverse=True):
        parts = [tensors[foreign].to(dtype) for foreign in source.names]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        gathered[name] = tensor.reshape(tensor.shape[source.leading_ones :])
    return gathered


def export_tensors(table: Mapping[str, Source], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `import_tensors`: splits our tensors into foreign ones."""
    scattered = {}
    for name, source in table.items():
        parts = tensors[name].chunk(len(source.names)) if len(source.names) > 1 else (tensors[name],)
        for foreign, part in zip(source.names, parts, strict=True):
            scattered[foreign] = part.reshape((1,) * source.leading_ones + part.shape).contiguous()
    return scattered


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


_HF_CLIP = [
    *HUGGINGFACE_EMBEDDINGS,
    (r"vision\.pre_norm\.(\w+)", ("VISION.pre_layrnorm.{0}",)),
    (r"vision\.post_norm\.(\w+)", ("VISION.post_layernorm.{0}",)),
]
_HF_CLIP_LAYER = block(
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
_TIMM_TOWER = TowerNaming(
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
        rules=[
            *_HF_CLIP,
            *inside(r"vision\.layers\.(\d+)\.", "VISION.encoder.layers.{0}.", _HF_CLIP_LAYER),
        ],
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
    _TIMM_TOWER,
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
