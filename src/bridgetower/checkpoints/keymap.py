"""Names of the same tensor in this package, in the official code and in transformers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from bridgetower.checkpoints.tensors import extent
from bridgetower.model.heads import HEADS

Naming = Literal["clip", "timm", "huggingface"]
Rule = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Source:
    """Where one of our tensors comes from."""

    # foreign tensors that are stacked along dimension 0: query, key and value are one here
    names: tuple[str, ...]
    leading_ones: int = 0  # dimensions of size 1 that the foreign tensor has in front
    is_scalar: bool = False  # the foreign tensor has no dimension; ours has one element

    def foreign_shape(self, shape: torch.Size) -> torch.Size:
        if self.is_scalar:
            return torch.Size()
        part = shape if len(self.names) == 1 else (shape[0] // len(self.names), *shape[1:])
        return torch.Size((1,) * self.leading_ones + tuple(part))


_BLOCK = ("attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.up", "mlp.down")


def block(*foreign: str | tuple[str, ...]) -> list[Rule]:
    """Returns the rules of a transformer layer, from the foreign names of the modules in `_BLOCK`."""
    names = [(name,) if isinstance(name, str) else name for name in foreign]
    return [
        (rf"{re.escape(ours)}\.(\w+)", theirs) for ours, theirs in zip(_BLOCK, names, strict=True)
    ]


def inside(prefix: str, foreign: str, rules: Iterable[Rule]) -> list[Rule]:
    """Moves a layer's rules under a prefix whose groups come first."""
    groups = re.compile(prefix).groups
    shift = {f"{{{index}}}": f"{{{index + groups}}}" for index in range(2)}
    return [
        (
            prefix + pattern,
            tuple(
                foreign + re.sub(r"\{\d\}", lambda found: shift[found[0]], name) for name in names
            ),
        )
        for pattern, names in rules
    ]


def image_tower(
    patches: str,
    class_token: str,
    positions: str,
    post_norm: str,
    layers: str,
    layer: list[Rule],
    **others: str,
) -> list[Rule]:
    """Returns the rules of an image tower; `others` are of a norm before the layers, as CLIP has it, or else none."""
    parts = {"pre_norm": r"\.(\w+)", "distillation_embedding": ""}
    of_patches = "weight" if "pre_norm" in others else r"\w+"
    return [
        (rf"vision\.patch_embedding\.({of_patches})", (f"VISION.{patches}.{{0}}",)),
        (r"vision\.class_embedding", (f"VISION.{class_token}",)),
        (r"vision\.position_embedding", (f"VISION.{positions}",)),
        (r"vision\.post_norm\.(\w+)", (f"VISION.{post_norm}.{{0}}",)),
        *(
            (rf"vision\.{ours}{parts[ours]}", (f"VISION.{theirs}",))
            for ours, theirs in others.items()
        ),
        *inside(r"vision\.layers\.(\d+)\.", f"VISION.{layers}.{{0}}.", layer),
    ]


# Our name -> foreign names; "{0}", "{1}" are the groups of the pattern. First match wins.
# Prefixes: TEXT is the text tower, VISION the image tower, MODEL everything else of the backbone.
_BERT_LAYER = block(
    "attention.output.LayerNorm.{0}",
    ("attention.self.query.{0}", "attention.self.key.{0}", "attention.self.value.{0}"),
    *(
        "attention.output.dense.{0}",
        "output.LayerNorm.{0}",
        "intermediate.dense.{0}",
        "output.dense.{0}",
    ),
)
_FUSION_LAYER = [
    (r"cross_attention\.query\.(\w+)", ("crossattention.self.query.{0}",)),
    (
        r"cross_attention\.key_value\.(\w+)",
        ("crossattention.self.key.{0}", "crossattention.self.value.{0}"),
    ),
    (r"cross_attention\.out\.(\w+)", ("crossattention.output.dense.{0}",)),
    (r"cross_attention_norm\.(\w+)", ("crossattention.output.LayerNorm.{0}",)),
    *(
        (pattern.replace("attention", "self_attention", 1), names)
        for pattern, names in _BERT_LAYER[:3]
    ),
    *_BERT_LAYER[3:],
]
_TEXT = [
    (r"text\.word_embedding\.weight", ("TEXT.embeddings.word_embeddings.weight",)),
    (r"text\.position_embedding\.weight", ("TEXT.embeddings.position_embeddings.weight",)),
    (r"text\.token_type_embedding\.weight", ("TEXT.embeddings.token_type_embeddings.weight",)),
    (r"text\.embedding_norm\.(\w+)", ("TEXT.embeddings.LayerNorm.{0}",)),
    (r"text\.pooler\.(.+)", ("TEXT.pooler.{0}",)),
    *inside(r"text\.layers\.(\d+)\.", "TEXT.encoder.layer.{0}.", _BERT_LAYER),
]
_CLIP_BLOCK = block(
    "ln_1.{0}",
    "attn.in_proj_{0}",
    "attn.out_proj.{0}",
    "ln_2.{0}",
    "mlp.c_fc.{0}",
    "mlp.c_proj.{0}",
)
_CLIP_REST = ("ln_post", "transformer.resblocks", _CLIP_BLOCK)
_CLIP = image_tower(
    "conv1", "class_embedding", "positional_embedding", *_CLIP_REST, pre_norm="ln_pre.{0}"
)
_HUGGINGFACE_EMBEDDINGS = (
    *(
        "embeddings.patch_embedding",
        "embeddings.class_embedding",
        "embeddings.position_embedding.weight",
    ),
)
_TIMM_BLOCK = block(
    "norm1.{0}", "attn.qkv.{0}", "attn.proj.{0}", "norm2.{0}", "mlp.fc1.{0}", "mlp.fc2.{0}"
)
_TIMM = image_tower(
    *("patch_embed.proj", "cls_token", "pos_embed", "norm", "blocks"),
    _TIMM_BLOCK,
    distillation_embedding="dist_token",
)
_SCALARS = re.compile(
    r"itc_head\.(temperature|log_logit_scale)|fusion\.(text|image)_bridges\.\d+\.(scale|beta)"
)
_TIMM_ONES = {
    "vision.class_embedding": 2,
    "vision.distillation_embedding": 2,
    "vision.position_embedding": 1,
}
_FUSION = [
    (r"token_type_embedding\.weight", ("MODEL.token_type_embeddings.weight",)),
    (r"fusion\.(text|image)_norm\.(\w+)", ("MODEL.cross_modal_{0}_layernorm.{1}",)),
    (
        r"fusion\.(text|image)_bridges\.(\d+)\.norm\.(\w+)",
        ("MODEL.cross_modal_{0}_link_tower.{1}.LayerNorm.{2}",),
    ),
    (
        r"fusion\.(text|image)_bridges\.(\d+)\.scale",
        ("MODEL.cross_modal_{0}_link_tower.{1}.scaled_factor",),
    ),
    (r"fusion\.(text|image)_bridges\.(\d+)\.beta", ("MODEL.cross_modal_{0}_link_tower.{1}.beta",)),
    # Managers as `microsoft` splits those of ManagerTower's files; their modules have our names there.
    (
        r"fusion\.(text|image)_bridges\.(\d+)\.((?:norms|stream|other|query|key|scores|weights|temperature)\S*)",
        ("MODEL.cross_modal_{0}_manager_tower.{1}.{2}",),
    ),
    (r"(text|image)_layer_embedding\.weight", ("MODEL.layer_embeddings_{0}.weight",)),
    (r"(text|image)_pooler\.(.+)", ("MODEL.cross_modal_{0}_pooler.{1}",)),
]
_SHARED_PROJECTIONS = [
    (r"(text|image)_projections\.0\.(\w+)", ("MODEL.cross_modal_{0}_transform.{1}",))
]
_SEPARATE_PROJECTIONS = [
    (r"(text|image)_projections\.(\d+)\.(\w+)", ("MODEL.cross_modal_{0}_transform.{1}.{2}",))
]
_HEADS = [
    (rf"{head}_head\.{re.escape(ours)}((?:\.\w+)*)", (theirs + "{0}",))
    for head, spec in HEADS.items()
    for ours, theirs in spec.published.items()
]
_COMMON = [
    *_TEXT,
    *_FUSION,
    *inside(
        r"fusion\.(text|image)_layers\.(\d+)\.", "MODEL.cross_modal_{0}_layers.{1}.", _FUSION_LAYER
    ),
    (r"vision\.separate_norms\.(\d+)\.(\w+)", ("VISION.ln_separate.{0}.{1}",)),
    *_HEADS,
]
_RULES: dict[Naming, list[Rule]] = {
    "clip": [*_CLIP, *_COMMON],
    "timm": [*_TIMM, *_COMMON],
    "huggingface": [
        *image_tower(*_HUGGINGFACE_EMBEDDINGS, *_CLIP_REST, pre_norm="ln_pre.{0}"),
        *_COMMON,
    ],
}
_PREFIXES: dict[Naming, dict[str, str]] = {
    "clip": {"TEXT.": "text_transformer.", "VISION.": "vit_model.visual.", "MODEL.": ""},
    "timm": {"TEXT.": "text_transformer.", "VISION.": "vit_model.", "MODEL.": ""},
    "huggingface": {"TEXT.": "text_model.", "VISION.": "vision_model.visual.", "MODEL.": ""},
}


def name_table(
    names: Iterable[str],
    naming: Naming,
    separate_projections: bool = False,
    backbone_prefix: str = "",
) -> dict[str, Source]:
    """Returns where each of our tensors is found under a foreign naming."""
    projections = _SEPARATE_PROJECTIONS if separate_projections else _SHARED_PROJECTIONS
    prefixes = {
        placeholder: backbone_prefix + prefix for placeholder, prefix in _PREFIXES[naming].items()
    }
    return rule_table(
        names, [*projections, *_RULES[naming]], prefixes, _TIMM_ONES if naming == "timm" else {}
    )


def rule_table(
    names: Iterable[str],
    rules: Iterable[Rule],
    prefixes: Mapping[str, str],
    leading_ones: Mapping[str, int],
) -> dict[str, Source]:
    compiled = [(re.compile(pattern), templates) for pattern, templates in rules]
    table = {}
    for name in names:
        found = (
            (match, templates)
            for pattern, templates in compiled
            if (match := pattern.fullmatch(name))
        )
        match, templates = next(found, (None, ()))
        if match is None:
            raise KeyError(f"no foreign name is known for {name}")
        foreign = [template.format(*match.groups()) for template in templates]
        for place, prefix in prefixes.items():
            foreign = [
                prefix + each.removeprefix(place) if each.startswith(place) else each
                for each in foreign
            ]
        is_scalar = _SCALARS.fullmatch(name) is not None
        table[name] = Source(tuple(foreign), leading_ones.get(name, 0), is_scalar)
    return table


def import_tensors(
    table: Mapping[str, Source], tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    gathered = {}
    # Joined ones first: their sources can then leave memory, while the others may stay mapped from the file.
    for name, source in sorted(table.items(), key=lambda entry: len(entry[1].names), reverse=True):
        parts = [tensors[foreign].to(dtype) for foreign in source.names]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        shape = (1,) if source.is_scalar else tensor.shape[source.leading_ones :]
        gathered[name] = tensor.reshape(shape)
    return gathered


def export_tensors(table: Mapping[str, Source], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    scattered = {}
    for name, source in table.items():
        parts = (
            tensors[name].chunk(len(source.names)) if len(source.names) > 1 else (tensors[name],)
        )
        for foreign, part in zip(source.names, parts, strict=True):
            shape = () if source.is_scalar else (1,) * source.leading_ones + part.shape
            scattered[foreign] = part.reshape(shape).contiguous()
    return scattered


Kind = Literal["openai", "timm", "clip", "vit", "bert"]
Values = Mapping[str, Any]

# Per width, of timm's ViT and DeiT, of RoBERTa and BERT.
PUBLISHED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}

MODEL_TYPES: dict[Kind, tuple[str, ...]] = {
    "clip": ("clip", "clip_vision_model"),
    "vit": ("vit", "deit"),
    "bert": ("roberta", "bert"),
}


@dataclass(frozen=True)
class TowerNaming:
    """How one publisher names the tensors of a tower."""

    kind: Kind  # the last three are transformers', and `bert` stands for RoBERTa too
    prefix: str  # in front of every name of the tower
    marker: str  # a name, after the prefix, that tells this kind from the others
    rules: Sequence[Rule]  # our names to the publisher's
    # patterns of names that stand beside the tower: other towers, heads, buffers
    droppable: tuple[str, ...]

    @property
    def part(self) -> Literal["vision", "text"]:
        return "text" if self.kind == "bert" else "vision"

    def table(self, names: Iterable[str]) -> dict[str, Source]:
        ones = _TIMM_ONES if self.kind in ("timm", "vit") else {}
        return rule_table(names, self.rules, {"VISION.": self.prefix, "TEXT.": self.prefix}, ones)

    def sizes(self, source: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Returns what tensors show of the tower's config; KeyError names one that is missing."""

        def foreign(name: str) -> str:
            return self.table([f"{self.part}.{name}"])[f"{self.part}.{name}"].names[0]

        def size(name: str, axis: int = 0) -> int:
            return extent(tensors, foreign(name), axis)

        layers = foreign("layers.0.mlp.up.weight").partition(".0.")[0] + "."
        numbers = {
            name.removeprefix(layers).partition(".")[0]
            for name in tensors
            if name.startswith(layers)
        }
        told = {"num_layers": len(numbers), "intermediate_size": size("layers.0.mlp.up.weight")}
        if self.part == "text":
            return told | {
                "vocab_size": size("word_embedding.weight"),
                "hidden_size": size("word_embedding.weight", -1),
                "max_positions": size("position_embedding.weight"),
                "type_vocab_size": size("token_type_embedding.weight"),
            }
        clip, patch = self.kind in ("openai", "clip"), size("patch_embedding.weight", -1)
        distilled = not clip and foreign("distillation_embedding") in tensors
        patches = size("position_embedding", -2) - 1 - distilled
        side = round(max(patches, 0) ** 0.5)
        if side**2 != patches or not side:
            raise ValueError(
                f"{source} has positions for {patches} patches; expected a square number"
            )
        return told | {
            "image_size": side * patch,
            "patch_size": patch,
            "hidden_size": size("patch_embedding.weight"),
            "pre_norm": clip,
            "patch_bias": not clip,
            "distillation_token": distilled,
        }


_HF_CLIP_LAYER = block(
    "layer_norm1.{0}",
    ("self_attn.q_proj.{0}", "self_attn.k_proj.{0}", "self_attn.v_proj.{0}"),
    *("self_attn.out_proj.{0}", "layer_norm2.{0}", "mlp.fc1.{0}", "mlp.fc2.{0}"),
)
_HF_CLIP = image_tower(
    *_HUGGINGFACE_EMBEDDINGS,
    "post_layernorm",
    "encoder.layers",
    _HF_CLIP_LAYER,
    pre_norm="pre_layrnorm.{0}",
)
_VIT_LAYER = block(
    "layernorm_before.{0}",
    (
        "attention.attention.query.{0}",
        "attention.attention.key.{0}",
        "attention.attention.value.{0}",
    ),
    *(
        "attention.output.dense.{0}",
        "layernorm_after.{0}",
        "intermediate.dense.{0}",
        "output.dense.{0}",
    ),
)
_VIT = image_tower(
    *(
        "embeddings.patch_embeddings.projection",
        "embeddings.cls_token",
        "embeddings.position_embeddings",
    ),
    *("layernorm", "encoder.layer", _VIT_LAYER),
    distillation_embedding="embeddings.distillation_token",
)


_TOWERS: tuple[
    tuple[Any, ...], ...
] = (  # kind, prefixes, marker, rules, and patterns of what stands beside
    (
        *("openai", ("visual.",), "class_embedding", _CLIP, r"PREFIXproj"),
        r"positional_embedding|text_projection|logit_scale|input_resolution|context_length|vocab_size",
        r"(transformer|token_embedding|ln_final)\..*",
    ),
    ("timm", ("",), "patch_embed.proj.weight", _TIMM, r"(head|head_dist|pre_logits)\..*"),
    (
        *(
            "clip",
            ("vision_model.", ""),
            "embeddings.class_embedding",
            _HF_CLIP,
            r"PREFIXembeddings\.position_ids",
        ),
        r"(text_model|classifier)\..*|(visual|text)_projection\.weight|logit_scale",
    ),
    (
        *(
            "vit",
            ("vit.", "deit.", ""),
            "embeddings.cls_token",
            _VIT,
            r"PREFIX(pooler\..*|embeddings\.mask_token)",
        ),
        r"((cls_|distillation_)?classifier|decoder)\..*",
    ),
    (
        *("bert", ("roberta.", "bert.", ""), "embeddings.word_embeddings.weight", _TEXT),
        r"PREFIX(pooler\..*|embeddings\.(position_ids|token_type_ids))",
        # Official: the MLM head starts anew, so those of RoBERTa and BERT are not read either.
        r"(lm_head|cls|classifier|qa_outputs)\..*",
    ),
)
NAMINGS = tuple(
    TowerNaming(
        kind,
        prefix,
        marker,
        rules,
        tuple(one.replace("PREFIX", re.escape(prefix)) for one in beside),
    )
    for kind, prefixes, marker, rules, *beside in _TOWERS
    for prefix in prefixes
)


def recognise(tensors: Mapping[str, Tensor], part: Literal["vision", "text"]) -> TowerNaming | None:
    known = (naming for naming in NAMINGS if naming.part == part)
    return next((naming for naming in known if naming.prefix + naming.marker in tensors), None)


def official_towers(naming: Naming) -> tuple[TowerNaming, TowerNaming]:
    """Returns the namings of the image tower and the text tower in the official code."""
    by_kind, prefixes = {known.kind: known for known in NAMINGS}, _PREFIXES[naming]
    image = by_kind["timm" if naming == "timm" else "openai"]
    return replace(image, prefix=prefixes["VISION."]), replace(
        by_kind["bert"], prefix=prefixes["TEXT."]
    )


def settings(
    source: str, kind: Kind, values: Values, width: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what tensors do not show of a tower's config: from config.json and, apart, defaults without one."""
    if kind == "openai":  # its code takes the heads from the width
        return {}, {
            "num_heads": max(width // 64, 1),
            "activation": "quick_gelu",
            "layer_norm_eps": 1e-5,
        }
    if kind == "timm":
        heads = {"num_heads": PUBLISHED_HEADS[width]} if width in PUBLISHED_HEADS else {}
        return {}, {**heads, "activation": "gelu", "layer_norm_eps": 1e-6}
    if not values:
        raise ValueError(
            f"{source} comes without its config.json, which tells heads and epsilon; pass its folder"
        )

    def known(name: str, default: str | None, *expected: str) -> Any:
        value = values.get(name, default)
        if value not in expected:
            names = " or ".join(map(repr, expected))
            raise ValueError(f"{source}/config.json sets {name} to {value!r}; expected {names}")
        return value

    model_type = known("model_type", None, *MODEL_TYPES[kind])
    if kind == "clip" and isinstance(values.get("vision_config"), dict):
        values = values["vision_config"]
    activations = ("quick_gelu", "gelu") if kind == "clip" else ("gelu",)
    activation = known("hidden_act", activations[0], *activations)
    found = {  # a config may leave the defaults of transformers out
        "num_heads": values.get("num_attention_heads", 12),
        "layer_norm_eps": values.get("layer_norm_eps", 1e-5 if kind == "clip" else 1e-12),
    }
    if kind != "bert":
        return found | {"activation": activation}, {}
    known("position_embedding_type", "absolute", "absolute")
    positions, pad = ("roberta", 1) if model_type == "roberta" else ("bert", 0)
    return found | {"positions": positions, "pad_token_id": values.get("pad_token_id", pad)}, {}
