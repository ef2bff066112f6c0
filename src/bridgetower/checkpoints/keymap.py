"""Names of the same tensor in this package, in the official code, in timm and in transformers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from bridgetower.checkpoints.tensors import extent
from bridgetower.model.heads import HEADS

Naming = Literal["clip", "timm", "huggingface"]
Tower = Literal["vision", "text"]

# Our name, and the foreign names of the tensors that are joined in it. Both have the fields of `_FIELDS`, and foreign
# names start with {VISION} in the image tower, {TEXT} in the text tower and {MODEL} in the rest of the backbone.
Rule = tuple[str, tuple[str, ...]]
_FIELDS = {
    "kind": r"\w+",  # weight or bias
    "layer": r"\d+",
    "tower": "text|image",
    "path": ".+",
    "suffix": r"(?:\.\w+)*",
    "manager": r"(?:norms|stream|other|query|key|scores|weights|temperature)\S*",
}


@dataclass(frozen=True)
class TensorSource:
    """The foreign tensors that make one of ours."""

    # Joined along dimension 0: query, key and value are one tensor here.
    names: tuple[str, ...]
    # Dimensions of size 1 that the foreign tensor has in front.
    leading_ones: int = 0
    # The foreign tensor has no dimension and ours has one element.
    is_scalar: bool = False

    def foreign_shape(self, shape: torch.Size) -> torch.Size:
        if self.is_scalar:
            return torch.Size()
        rows = [size // len(self.names) for size in shape[:1]]
        return torch.Size((*[1] * self.leading_ones, *rows, *shape[1:]))


_BLOCK = ("attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.up", "mlp.down")


def block(*foreign: str | tuple[str, ...]) -> list[Rule]:
    """Returns the rules of a transformer layer, from the foreign names of the modules in `_BLOCK`."""
    names = [(name,) if isinstance(name, str) else name for name in foreign]
    return [(f"{module}.{{kind}}", theirs) for module, theirs in zip(_BLOCK, names, strict=True)]


def inside(prefix: str, foreign: str, rules: Iterable[Rule]) -> list[Rule]:
    """Moves rules under a prefix."""
    return [(prefix + ours, tuple(foreign + name for name in names)) for ours, names in rules]


def image_tower(
    patches: str,
    class_token: str,
    positions: str,
    post_norm: str,
    layers: str,
    layer: list[Rule],
    *,
    pre_norm: str | None = None,
    distillation_token: str | None = None,
) -> list[Rule]:
    """Returns the rules of an image tower. With a norm before the layers, as in CLIP, its patches have no bias."""
    kind = "{kind}" if pre_norm is None else "weight"
    rules: list[Rule] = [
        (f"patch_embedding.{kind}", (f"{patches}.{kind}",)),
        ("class_embedding", (class_token,)),
        ("position_embedding", (positions,)),
        ("post_norm.{kind}", (post_norm + ".{kind}",)),
        *inside("layers.{layer}.", layers + ".{layer}.", layer),
    ]
    if pre_norm is not None:
        rules.append(("pre_norm.{kind}", (pre_norm + ".{kind}",)))
    if distillation_token is not None:
        rules.append(("distillation_embedding", (distillation_token,)))
    return inside("vision.", "{VISION}", rules)


_BERT_LAYER = block(
    "attention.output.LayerNorm.{kind}",
    (
        "attention.self.query.{kind}",
        "attention.self.key.{kind}",
        "attention.self.value.{kind}",
    ),
    "attention.output.dense.{kind}",
    "output.LayerNorm.{kind}",
    "intermediate.dense.{kind}",
    "output.dense.{kind}",
)
_FUSION_LAYER = [
    ("cross_attention.query.{kind}", ("crossattention.self.query.{kind}",)),
    (
        "cross_attention.key_value.{kind}",
        ("crossattention.self.key.{kind}", "crossattention.self.value.{kind}"),
    ),
    ("cross_attention.out.{kind}", ("crossattention.output.dense.{kind}",)),
    ("cross_attention_norm.{kind}", ("crossattention.output.LayerNorm.{kind}",)),
    *inside("self_", "", _BERT_LAYER[:3]),
    *_BERT_LAYER[3:],
]
_TEXT = inside(
    "text.",
    "{TEXT}",
    [
        ("word_embedding.weight", ("embeddings.word_embeddings.weight",)),
        ("position_embedding.weight", ("embeddings.position_embeddings.weight",)),
        ("token_type_embedding.weight", ("embeddings.token_type_embeddings.weight",)),
        ("embedding_norm.{kind}", ("embeddings.LayerNorm.{kind}",)),
        ("pooler.{path}", ("pooler.{path}",)),
        *inside("layers.{layer}.", "encoder.layer.{layer}.", _BERT_LAYER),
    ],
)
_CLIP_BLOCK = block(
    "ln_1.{kind}",
    "attn.in_proj_{kind}",
    "attn.out_proj.{kind}",
    "ln_2.{kind}",
    "mlp.c_fc.{kind}",
    "mlp.c_proj.{kind}",
)
_CLIP = image_tower(
    "conv1",
    "class_embedding",
    "positional_embedding",
    "ln_post",
    "transformer.resblocks",
    _CLIP_BLOCK,
    pre_norm="ln_pre",
)
_TIMM_BLOCK = block(
    "norm1.{kind}",
    "attn.qkv.{kind}",
    "attn.proj.{kind}",
    "norm2.{kind}",
    "mlp.fc1.{kind}",
    "mlp.fc2.{kind}",
)
_TIMM = image_tower(
    "patch_embed.proj",
    "cls_token",
    "pos_embed",
    "norm",
    "blocks",
    _TIMM_BLOCK,
    distillation_token="dist_token",
)
# transformers' BridgeTower names the embeddings as its CLIP does, and the layers as OpenAI's CLIP.
_HF_EMBEDDINGS = (
    "embeddings.patch_embedding",
    "embeddings.class_embedding",
    "embeddings.position_embedding.weight",
)
_HF_BRIDGETOWER = image_tower(
    *_HF_EMBEDDINGS, "ln_post", "transformer.resblocks", _CLIP_BLOCK, pre_norm="ln_pre"
)
_SCALARS = re.compile(
    r"itc_head\.(temperature|log_logit_scale)|fusion\.(text|image)_bridges\.\d+\.(scale|beta)"
)
_TIMM_ONES = {
    "vision.class_embedding": 2,
    "vision.distillation_embedding": 2,
    "vision.position_embedding": 1,
}
_LINK_TOWER = "{MODEL}cross_modal_{tower}_link_tower.{layer}."
_COMMON: list[Rule] = [
    *_TEXT,
    ("token_type_embedding.weight", ("{MODEL}token_type_embeddings.weight",)),
    ("fusion.{tower}_norm.{kind}", ("{MODEL}cross_modal_{tower}_layernorm.{kind}",)),
    ("fusion.{tower}_bridges.{layer}.norm.{kind}", (_LINK_TOWER + "LayerNorm.{kind}",)),
    ("fusion.{tower}_bridges.{layer}.scale", (_LINK_TOWER + "scaled_factor",)),
    ("fusion.{tower}_bridges.{layer}.beta", (_LINK_TOWER + "beta",)),
    # Managers as `microsoft` splits those of ManagerTower's files; their modules have our names there.
    (
        "fusion.{tower}_bridges.{layer}.{manager}",
        ("{MODEL}cross_modal_{tower}_manager_tower.{layer}.{manager}",),
    ),
    ("{tower}_layer_embedding.weight", ("{MODEL}layer_embeddings_{tower}.weight",)),
    ("{tower}_pooler.{path}", ("{MODEL}cross_modal_{tower}_pooler.{path}",)),
    *inside(
        "fusion.{tower}_layers.{layer}.",
        "{MODEL}cross_modal_{tower}_layers.{layer}.",
        _FUSION_LAYER,
    ),
    ("vision.separate_norms.{layer}.{kind}", ("{VISION}ln_separate.{layer}.{kind}",)),
    *(
        (f"{head}_head.{module}{{suffix}}", (theirs + "{suffix}",))
        for head, spec in HEADS.items()
        for module, theirs in spec.published.items()
    ),
]
_SHARED_PROJECTIONS: list[Rule] = [
    ("{tower}_projections.0.{kind}", ("{MODEL}cross_modal_{tower}_transform.{kind}",))
]
_SEPARATE_PROJECTIONS: list[Rule] = [
    (
        "{tower}_projections.{layer}.{kind}",
        ("{MODEL}cross_modal_{tower}_transform.{layer}.{kind}",),
    )
]
_IMAGE_TOWERS = {"clip": _CLIP, "timm": _TIMM, "huggingface": _HF_BRIDGETOWER}
_PREFIXES: dict[Naming, dict[str, str]] = {
    "clip": {"TEXT": "text_transformer.", "VISION": "vit_model.visual.", "MODEL": ""},
    "timm": {"TEXT": "text_transformer.", "VISION": "vit_model.", "MODEL": ""},
    "huggingface": {"TEXT": "text_model.", "VISION": "vision_model.visual.", "MODEL": ""},
}


def name_table(
    names: Iterable[str],
    naming: Naming,
    separate_projections: bool = False,
    backbone_prefix: str = "",
) -> dict[str, TensorSource]:
    """Returns where each of our tensors is found under the naming of a whole model."""
    projections = _SEPARATE_PROJECTIONS if separate_projections else _SHARED_PROJECTIONS
    prefixes = {field: backbone_prefix + prefix for field, prefix in _PREFIXES[naming].items()}
    rules = [*projections, *_IMAGE_TOWERS[naming], *_COMMON]
    return rule_table(names, rules, prefixes, _TIMM_ONES if naming == "timm" else {})


def rule_table(
    names: Iterable[str],
    rules: Iterable[Rule],
    prefixes: Mapping[str, str],
    leading_ones: Mapping[str, int],
) -> dict[str, TensorSource]:
    """Returns where each of our tensors is found, by the first rule that fits its name."""
    patterns = [(_pattern(ours), theirs) for ours, theirs in rules]
    table = {}
    for name in names:
        for pattern, templates in patterns:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            fields = {**prefixes, **match.groupdict()}
            foreign = tuple(template.format(**fields) for template in templates)
            is_scalar = _SCALARS.fullmatch(name) is not None
            table[name] = TensorSource(foreign, leading_ones.get(name, 0), is_scalar)
            break
        else:
            raise KeyError(f"no foreign name is known for {name}")
    return table


@cache
def _pattern(ours: str) -> re.Pattern[str]:
    """Compiles our name in a rule, with the patterns of `_FIELDS` for its fields."""
    fields = {name: f"(?P<{name}>{pattern})" for name, pattern in _FIELDS.items()}
    return re.compile(ours.replace(".", r"\.").format(**fields))


def import_tensors(
    table: Mapping[str, TensorSource],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Returns our tensors from foreign ones."""
    imported = {}
    # Joined tensors first: their sources can then leave memory, while the others may stay mapped from the file.
    for name, source in sorted(table.items(), key=lambda entry: len(entry[1].names), reverse=True):
        pieces = [tensors[foreign].to(dtype) for foreign in source.names]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        shape = (1,) if source.is_scalar else tensor.shape[source.leading_ones :]
        imported[name] = tensor.reshape(shape)
    return imported


def export_tensors(
    table: Mapping[str, TensorSource], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns foreign tensors from ours."""
    exported = {}
    for name, source in table.items():
        tensor = tensors[name]
        shape = source.foreign_shape(tensor.shape)
        pieces = tensor.chunk(len(source.names)) if len(source.names) > 1 else (tensor,)
        for foreign, piece in zip(source.names, pieces, strict=True):
            exported[foreign] = piece.reshape(shape).contiguous()
    return exported


Kind = Literal["openai", "timm", "clip", "vit", "bert"]
Values = Mapping[str, Any]

# Heads by width, of timm's ViT and DeiT, of RoBERTa and BERT.
PUBLISHED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}

MODEL_TYPES: dict[Kind, tuple[str, ...]] = {
    "clip": ("clip", "clip_vision_model"),
    "vit": ("vit", "deit"),
    "bert": ("roberta", "bert"),
}


@dataclass(frozen=True)
class TowerNaming:
    """How one publisher names the tensors of a tower."""

    # `clip`, `vit` and `bert`, which stands for RoBERTa too, are those of transformers.
    kind: Kind
    # In front of every name of the tower.
    prefix: str
    # A name, after the prefix, that only this kind has.
    marker: str
    rules: Sequence[Rule]
    # Patterns of names that are beside the tower: other towers, heads, buffers.
    droppable: tuple[str, ...]

    @property
    def tower(self) -> Tower:
        return "text" if self.kind == "bert" else "vision"

    def table(self, names: Iterable[str]) -> dict[str, TensorSource]:
        leading_ones = _TIMM_ONES if self.kind in ("timm", "vit") else {}
        prefixes = {"VISION": self.prefix, "TEXT": self.prefix}
        return rule_table(names, self.rules, prefixes, leading_ones)

    def sizes(self, source: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Returns the fields of the tower's config that tensors show. KeyError names a tensor that is missing."""

        def foreign(name: str) -> str:
            (tensor_source,) = self.table([f"{self.tower}.{name}"]).values()
            return tensor_source.names[0]

        def size(name: str, axis: int = 0) -> int:
            return extent(tensors, foreign(name), axis)

        # The layers are numbered.
        up = "layers.0.mlp.up.weight"
        start, _, _ = foreign(up).partition("0.")
        layer = re.compile(re.escape(start) + r"(\d+)\.")
        numbers = {match[1] for match in map(layer.match, tensors) if match}
        sizes = {"num_layers": len(numbers), "intermediate_size": size(up)}
        if self.tower == "text":
            return sizes | {
                "vocab_size": size("word_embedding.weight"),
                "hidden_size": size("word_embedding.weight", -1),
                "max_positions": size("position_embedding.weight"),
                "type_vocab_size": size("token_type_embedding.weight"),
            }

        # Of an image tower, positions are those of a square of patches and one or two tokens.
        is_clip = self.kind in ("openai", "clip")
        is_distilled = not is_clip and foreign("distillation_embedding") in tensors
        patches = size("position_embedding", -2) - 1 - is_distilled
        side = round(max(patches, 0) ** 0.5)
        if side**2 != patches or not side:
            raise ValueError(
                f"{source} has positions for {patches} patches; expected a square number"
            )
        patch_size = size("patch_embedding.weight", -1)
        return sizes | {
            "image_size": side * patch_size,
            "patch_size": patch_size,
            "hidden_size": size("patch_embedding.weight"),
            "pre_norm": is_clip,
            "patch_bias": not is_clip,
            "distillation_token": is_distilled,
        }


_HF_CLIP_LAYER = block(
    "layer_norm1.{kind}",
    ("self_attn.q_proj.{kind}", "self_attn.k_proj.{kind}", "self_attn.v_proj.{kind}"),
    "self_attn.out_proj.{kind}",
    "layer_norm2.{kind}",
    "mlp.fc1.{kind}",
    "mlp.fc2.{kind}",
)
_HF_CLIP = image_tower(
    *_HF_EMBEDDINGS,
    "post_layernorm",
    "encoder.layers",
    _HF_CLIP_LAYER,
    pre_norm="pre_layrnorm",
)
_VIT_LAYER = block(
    "layernorm_before.{kind}",
    (
        "attention.attention.query.{kind}",
        "attention.attention.key.{kind}",
        "attention.attention.value.{kind}",
    ),
    "attention.output.dense.{kind}",
    "layernorm_after.{kind}",
    "intermediate.dense.{kind}",
    "output.dense.{kind}",
)
_VIT = image_tower(
    "embeddings.patch_embeddings.projection",
    "embeddings.cls_token",
    "embeddings.position_embeddings",
    "layernorm",
    "encoder.layer",
    _VIT_LAYER,
    distillation_token="embeddings.distillation_token",
)

# The kinds of towers, with all their prefixes.
_TOWERS: tuple[tuple[Kind, tuple[str, ...], str, list[Rule], tuple[str, ...]], ...] = (
    (
        "openai",
        ("visual.",),
        "class_embedding",
        _CLIP,
        (
            r"visual\.proj|positional_embedding|text_projection|logit_scale|input_resolution",
            r"context_length|vocab_size|(transformer|token_embedding|ln_final)\..*",
        ),
    ),
    ("timm", ("",), "patch_embed.proj.weight", _TIMM, (r"(head|head_dist|pre_logits)\..*",)),
    (
        "clip",
        ("vision_model.", ""),
        "embeddings.class_embedding",
        _HF_CLIP,
        (
            r"(vision_model\.)?embeddings\.position_ids",
            r"(text_model|classifier)\..*|(visual|text)_projection\.weight|logit_scale",
        ),
    ),
    (
        "vit",
        ("vit.", "deit.", ""),
        "embeddings.cls_token",
        _VIT,
        (
            r"((vit|deit)\.)?(pooler\..*|embeddings\.mask_token)",
            r"((cls_|distillation_)?classifier|decoder)\..*",
        ),
    ),
    (
        "bert",
        ("roberta.", "bert.", ""),
        "embeddings.word_embeddings.weight",
        _TEXT,
        (
            r"((roberta|bert)\.)?(pooler\..*|embeddings\.(position_ids|token_type_ids))",
            # The MLM head starts anew, as in the official code, so those of RoBERTa and BERT are not read either.
            r"(lm_head|cls|classifier|qa_outputs)\..*",
        ),
    ),
)
NAMINGS = tuple(
    TowerNaming(kind, prefix, marker, rules, droppable)
    for kind, prefixes, marker, rules, droppable in _TOWERS
    for prefix in prefixes
)


def recognise(tensors: Mapping[str, Tensor], tower: Tower) -> TowerNaming | None:
    """Returns the naming of a tower among tensors, or None if there is no known one."""
    for naming in NAMINGS:
        if naming.tower == tower and naming.prefix + naming.marker in tensors:
            return naming
    return None


def official_towers(naming: Naming) -> tuple[TowerNaming, TowerNaming]:
    """Returns the namings of the image tower and the text tower in the official code."""
    by_kind = {naming.kind: naming for naming in NAMINGS}
    image = by_kind["timm" if naming == "timm" else "openai"]
    prefixes = _PREFIXES[naming]
    return (
        replace(image, prefix=prefixes["VISION"]),
        replace(by_kind["bert"], prefix=prefixes["TEXT"]),
    )


def default_settings(kind: Kind, width: int) -> dict[str, Any]:
    """Returns fields of a config that tensors do not show, of image towers whose publishers write no config.json."""
    if kind == "openai":
        # Its code takes the heads from the width.
        num_heads = max(width // 64, 1)
        return {"num_heads": num_heads, "activation": "quick_gelu", "layer_norm_eps": 1e-5}
    if kind == "timm":
        heads = {"num_heads": PUBLISHED_HEADS[width]} if width in PUBLISHED_HEADS else {}
        return {**heads, "activation": "gelu", "layer_norm_eps": 1e-6}
    return {}


def config_settings(source: str, kind: Kind, values: Values) -> dict[str, Any]:
    """Returns fields of a config that tensors do not show, from transformers' config.json."""
    if kind not in MODEL_TYPES:
        return {}
    if not values:
        raise ValueError(
            f"{source} comes without its config.json, which tells heads and epsilon; pass its folder"
        )

    def checked(name: str, default: str | None, *expected: str) -> Any:
        value = values.get(name, default)
        if value not in expected:
            names = " or ".join(map(repr, expected))
            raise ValueError(f"{source}/config.json sets {name} to {value!r}; expected {names}")
        return value

    model_type = checked("model_type", None, *MODEL_TYPES[kind])
    if kind == "clip" and isinstance(values.get("vision_config"), dict):
        values = values["vision_config"]
    activations = ("quick_gelu", "gelu") if kind == "clip" else ("gelu",)
    activation = checked("hidden_act", activations[0], *activations)
    # A config may leave out the defaults of transformers.
    settings = {
        "num_heads": values.get("num_attention_heads", 12),
        "layer_norm_eps": values.get("layer_norm_eps", 1e-5 if kind == "clip" else 1e-12),
    }
    if kind != "bert":
        return settings | {"activation": activation}
    checked("position_embedding_type", "absolute", "absolute")
    positions, padding = ("roberta", 1) if model_type == "roberta" else ("bert", 0)
    padding = values.get("pad_token_id", padding)
    return settings | {"positions": positions, "pad_token_id": padding}
