"""Official `.ckpt` files: config and names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bridgetower.checkpoints.checkpoint import Checkpoint, collect, extra_tensor_names, parameter_shapes
from bridgetower.checkpoints.keymap import Naming, name_table
from bridgetower.checkpoints.tensors import extent
from bridgetower.checkpoints.tower_formats import PUBLISHED_HEADS
from bridgetower.model.config import FusionConfig, HeadsConfig, ModelConfig
from bridgetower.model.plain import known_fields
from bridgetower.model.tower_config import TextConfig, VisionConfig

# Left-overs of CLIP's text side and of timm's classifier, buffers, and task heads of one layer (`task_head_layers=1`).
_DROPPABLE = (
    r"vit_model\.(positional_embedding|text_projection|logit_scale)",
    r"vit_model\.(ln_final|token_embedding|transformer|head|head_dist|pre_logits)\..*",
    r"vit_model\.visual\.proj",
    r"text_transformer\.embeddings\.(position_ids|token_type_ids)",
    r"(vqa|snli|nlvr2)_classifier\..*",
    r"rank_output\..*",
    r"temperature",
    r"(train|val|test|dev)_.*",  # metric states
)


@dataclass(frozen=True)
class Settings:
    """What is read of the official run config (`hyper_parameters.config` of a file), under its names."""

    tokenizer: str
    model_type: str
    num_heads: int
    drop_rate: float
    max_text_len: int
    val_transform_keys: tuple[str, ...]
    nlvr2_drop_rate: float = HeadsConfig.nlvr2_dropout
    meter_fusion: bool = False

    @classmethod
    def read(cls, source: str, official: object) -> Settings:
        """Picks them out.

        Raises:
            ValueError: One is missing or of the wrong type; `source` says where.
        """
        return known_fields(cls, official, f"{source}: hyper_parameters.config")


def read_checkpoint(
    source: str,
    official: Settings,
    tensors: Mapping[str, Tensor],
    overrides: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> Checkpoint:
    """Builds a checkpoint from the official run config and state dict.

    Args:
        source: Named in errors.
        official: The run config of the file.
        tensors: `state_dict` of the file.
        overrides: Dotted fields that the file cannot tell, such as `text.num_heads` of an unpublished tower.
        dtype: Of the model's tensors; None keeps each as it is.

    Raises:
        ValueError: The config cannot be told, or tensors are missing, unknown or wrongly shaped.
    """
    naming: Naming = "timm" if "vit_model.cls_token" in tensors else "clip"
    try:
        config = _model_config(official, tensors, naming, overrides)
    except KeyError as error:
        raise ValueError(f"{source} lacks {error}; expected an official BridgeTower or METER checkpoint") from error
    table = name_table(parameter_shapes(config), naming)
    extra_names = [name for name in extra_tensor_names(config) if naming == "clip" or "text." in name]
    return collect(source, config, tensors, table, name_table(extra_names, naming), _DROPPABLE, dtype)


def _model_config(
    official: Settings, tensors: Mapping[str, Tensor], naming: Naming, overrides: Mapping[str, Any]
) -> ModelConfig:
    vision = _vision_config(tensors, naming, overrides.get("vision.num_heads"))
    config = ModelConfig(
        vision=vision,
        text=_text_config(official, tensors, overrides.get("text.num_heads")),
        fusion=_fusion_config(official, tensors),
        heads=_heads_config(official, tensors),
    )
    return config.override(overrides)


def _heads_config(official: Settings, tensors: Mapping[str, Tensor]) -> HeadsConfig:
    """Every head that the file has; fine-tuned ones may carry those of several tasks, of one inner width."""
    inner = [extent(tensors, f"{task}_classifier.1.weight") for task in ("vqa", "snli", "nlvr2") if _has(task, tensors)]
    pooled_size = 2 * extent(tensors, "cross_modal_text_transform.weight")
    itc = "itc_text_head.fc.weight"
    return HeadsConfig(
        mlm="mlm_score.bias" in tensors,
        itm="itm_score.fc.weight" in tensors,
        itc="tower" if itc in tensors else None,
        itc_size=extent(tensors, itc) if itc in tensors else HeadsConfig.itc_size,
        rank="rank_output.weight" in tensors,
        vqa=extent(tensors, "vqa_classifier.3.weight") if _has("vqa", tensors) else 0,
        snli_ve=_has("snli", tensors),
        nlvr2=_has("nlvr2", tensors),
        hidden_scale=inner[0] / pooled_size if inner else HeadsConfig.hidden_scale,
        nlvr2_dropout=official.nlvr2_drop_rate,
    )


def _has(task: str, tensors: Mapping[str, Tensor]) -> bool:
    return f"{task}_classifier.3.weight" in tensors


def _vision_config(tensors: Mapping[str, Tensor], naming: Naming, num_heads: int | None) -> VisionConfig:
    prefix = "vit_model." if naming == "timm" else "vit_model.visual."
    timm = naming == "timm"
    patches = prefix + ("patch_embed.proj.weight" if timm else "conv1.weight")
    positions = prefix + ("pos_embed" if timm else "positional_embedding")
    blocks = prefix + ("blocks." if timm else "transformer.resblocks.")
    width, patch = extent(tensors, patches), extent(tensors, patches, -1)
    num_patches = extent(tensors, positions, -2) - 1
    return VisionConfig(
        image_size=round(max(num_patches, 0) ** 0.5) * patch,
        patch_size=patch,
        hidden_size=width,
        num_layers=_count(tensors, blocks),
        # CLIP's own code derives the heads from the width; timm's names fix them.
        num_heads=num_heads or (_heads("vision", width) if timm else max(width // 64, 1)),
        intermediate_size=extent(tensors, blocks + ("0.mlp.fc1.weight" if timm else "0.mlp.c_fc.weight")),
        layer_norm_eps=1e-6 if timm else 1e-5,
        activation="gelu" if timm else "quick_gelu",
        pre_norm=not timm,
        patch_bias=timm,
    )


def _text_config(official: Settings, tensors: Mapping[str, Tensor], num_heads: int | None) -> TextConfig:
    roberta = "roberta" in official.tokenizer
    embeddings = "text_transformer.embeddings."
    width = extent(tensors, f"{embeddings}word_embeddings.weight", 1)
    layers = "text_transformer.encoder.layer."
    return TextConfig(
        vocab_size=extent(tensors, f"{embeddings}word_embeddings.weight"),
        hidden_size=width,
        num_layers=_count(tensors, layers),
        num_heads=num_heads or _heads("text", width),
        intermediate_size=extent(tensors, layers + "0.intermediate.dense.weight"),
        max_positions=extent(tensors, f"{embeddings}position_embeddings.weight"),
        type_vocab_size=extent(tensors, f"{embeddings}token_type_embeddings.weight"),
        pad_token_id=1 if roberta else 0,
        positions="roberta" if roberta else "bert",
        layer_norm_eps=1e-5 if roberta else 1e-12,
    )


def _fusion_config(official: Settings, tensors: Mapping[str, Tensor]) -> FusionConfig:
    if official.meter_fusion:
        raise ValueError(
            "the official option meter_fusion is not supported; expected model_type BT or METER without it"
        )
    layers = "cross_modal_text_layers."
    return FusionConfig(
        hidden_size=extent(tensors, "cross_modal_text_transform.weight"),
        num_layers=_count(tensors, layers),
        num_heads=official.num_heads,
        intermediate_size=extent(tensors, layers + "0.intermediate.dense.weight"),
        bridge=None if official.model_type == "METER" else "add",
        input_norm="cross_modal_text_layernorm.weight" in tensors,
        num_token_types=extent(tensors, "token_type_embeddings.weight"),
        dropout=official.drop_rate,
    )


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    numbers = {name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)}
    if not numbers:
        raise KeyError(f"{prefix}*")
    return len(numbers)


def _heads(tower: str, width: int) -> int:
    if width not in PUBLISHED_HEADS:  # the official code takes them from the tower's name, which a file lacks
        raise ValueError(
            f"an official checkpoint does not store the attention heads of its {tower} tower of width {width}; "
            f"pass overrides={{'{tower}.num_heads': ...}}"
        )
    return PUBLISHED_HEADS[width]
