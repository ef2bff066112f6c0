"""Official `.ckpt` files of BridgeTower, METER and ManagerTower, with their configs and names."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bridgetower.checkpoints.checkpoint import (
    Checkpoint,
    collect,
    extra_tensor_names,
    parameter_shapes,
)
from bridgetower.checkpoints.keymap import (
    PUBLISHED_HEADS,
    Naming,
    default_settings,
    name_table,
    official_towers,
)
from bridgetower.checkpoints.tensors import extent
from bridgetower.model.config import (
    FusionConfig,
    HeadsConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from bridgetower.plain import known_fields
from bridgetower.processor import Processor, ProcessorConfig

# Tensors of CLIP's text encoder and of timm's classifier, buffers, and a temperature that managers never read.
_DROPPABLE = (
    r"vit_model\.(positional_embedding|text_projection|logit_scale)",
    r"vit_model\.(ln_final|token_embedding|transformer|head|head_dist|pre_logits)\..*",
    r"vit_model\.visual\.proj",
    r"text_transformer\.embeddings\.(position_ids|token_type_ids)",
    r"cross_modal_(text|image)_manager_tower\.\d+\.softmax_temperature_cross",
    r"temperature",
    r"(train|val|test|dev)_.*",  # metric states
)
_MANAGER_MODULES = {
    "extra_query_LayerNorm": "other_norm",
    "LayerNorm": "norms",
    "fusion_attention.q_proj": "query",
    "fusion_attention.k_proj": "key",
    "linear_controller": "scores",
}
_MANAGERS = {"SAUE": "static_manager", "AAUE": "adaptive_manager"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Fields of the official run config, with defaults of METER's code, which has no such options."""

    tokenizer: str
    num_heads: int
    drop_rate: float
    max_text_len: int
    val_transform_keys: tuple[str, ...]
    model_type: str = "METER"
    manager_type: str = "AAUE"
    nlvr2_drop_rate: float = 0.0
    meter_fusion: bool = False
    vit_layernorm_shared: bool = True


def read_official(
    source: str,
    run_config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    overrides: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> Checkpoint:
    """Builds a checkpoint from the run config and the tensors of an official file."""
    # Some options change the model and are not supported.
    official = known_fields(Settings, run_config, f"{source}: hyper_parameters.config")
    if "vit_model.layers.0.blocks.0.norm1.weight" in tensors:
        raise ValueError(
            f"{source} has a Swin image tower, which is not supported; expected one with CLIP or a ViT"
        )
    if not official.vit_layernorm_shared:
        logger.warning(
            "%s was trained with vit_layernorm_shared=False, but one shared LayerNorm is applied to all layers of its "
            "image tower, as in `infer` of the official code; its other path gives other results",
            source,
        )

    # The config follows from the shapes of the tensors.
    naming: Naming = "timm" if "vit_model.cls_token" in tensors else "clip"
    try:
        tensors = _renamed(tensors)
        config = _read_config(source, official, tensors, naming, overrides)
        config = config.override(overrides)
    except KeyError as error:
        raise ValueError(
            f"{source} lacks {error}; expected an official BridgeTower, METER or ManagerTower checkpoint"
        ) from error

    # The weights.
    extra_names = extra_tensor_names(config)
    if naming == "timm":
        extra_names = [name for name in extra_names if name.startswith("text.")]
    table = name_table(parameter_shapes(config), naming)
    extra_table = name_table(extra_names, naming)
    checkpoint = collect(source, config, tensors, table, extra_table, _DROPPABLE, dtype)

    # Of the official evaluation transforms, `clip` crops, `blip` and `albef` squash. The file has no tokenizer.
    squashes = any("blip" in key or "albef" in key for key in official.val_transform_keys)
    preprocessing = ProcessorConfig(
        profile="official-finetune" if squashes else "official-pretrain",
        image_size=config.vision.image_size,
        max_length=official.max_text_len,
    )
    return replace(checkpoint, processor=Processor(preprocessing, None))


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors with the names of managers and heads that `keymap` has.

    Weights and stream weights of a manager are rows of one official tensor, which is split.
    """
    renamed = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^cross_modal_(itc_(?:text|image)_head\.)", r"\1", name)

        # The only layer of a head takes the place of the last of two.
        task, _, parameter = name.partition("_classifier.0.")
        if parameter and f"{task}_classifier.3.weight" not in tensors:
            name = f"{task}_classifier.3.{parameter}"

        manager, _, parameter = name.partition(".manager_layer.")
        if not parameter:
            renamed[name] = tensor
            continue

        # Each layer has a norm, and the last norm is that of the stream, which the first manager lacks.
        norm = f"{manager}.manager_layer.LayerNorm"
        width = extent(tensors, f"{norm}.0.weight")
        norms = sum(other.startswith(f"{norm}.") for other in tensors) // 2
        layers = norms if manager.endswith("_tower.0") else norms - 1
        if parameter.startswith("layer_scores"):
            # [1, layers (+ 1), 1, width or 1]. Adaptive managers have the last row only, under another name.
            rows = tensor.reshape(extent(tensors, name, 1), -1).expand(-1, width)
            if parameter == "layer_scores":
                renamed[f"{manager}.weights"] = rows[:layers].clone()
                rows = rows[layers:]
            if len(rows):
                renamed[f"{manager}.stream_weight"] = rows[0].clone()
        elif parameter == "softmax_temperature":
            renamed[f"{manager}.temperature"] = tensor.reshape(1)
        else:
            if parameter.startswith("LayerNorm"):
                parameter = parameter.replace(f"LayerNorm.{layers}.", "stream_norm.")
            for official, ours in _MANAGER_MODULES.items():
                parameter = parameter.replace(official, ours)
            renamed[f"{manager}.{parameter}"] = tensor
    return renamed


def _read_config(
    source: str,
    official: Settings,
    tensors: Mapping[str, Tensor],
    naming: Naming,
    overrides: Mapping[str, Any],
) -> ModelConfig:
    """Returns the config that follows from the shapes of the tensors and from the run config."""
    if official.meter_fusion:
        raise ValueError(
            "the official option meter_fusion is not supported; expected model_type BT or METER without it"
        )
    image_tower, text_tower = official_towers(naming)
    image = image_tower.sizes(source, tensors)
    image |= default_settings(image_tower.kind, image["hidden_size"])
    text = text_tower.sizes(source, tensors)
    if "roberta" in official.tokenizer:
        text |= {"positions": "roberta", "pad_token_id": 1, "layer_norm_eps": 1e-5}
    else:
        text |= {"positions": "bert", "pad_token_id": 0, "layer_norm_eps": 1e-12}

    # The official code takes the attention heads from the name of a tower, which a file lacks.
    for tower, values in (("vision", image), ("text", text)):
        width = values["hidden_size"]
        num_heads = values.get("num_heads") or PUBLISHED_HEADS.get(width)
        values["num_heads"] = overrides.get(f"{tower}.num_heads") or num_heads
        if values["num_heads"] is None:
            raise ValueError(
                f"an official checkpoint does not store the attention heads of its {tower} tower of width {width}; "
                f"pass overrides={{'{tower}.num_heads': ...}}"
            )

    layers = {name.split(".")[1] for name in tensors if name.startswith("cross_modal_text_layers.")}
    fusion = FusionConfig(
        hidden_size=extent(tensors, "cross_modal_text_transform.weight"),
        num_layers=len(layers),
        num_heads=official.num_heads,
        intermediate_size=extent(tensors, "cross_modal_text_layers.0.intermediate.dense.weight"),
        num_token_types=extent(tensors, "token_type_embeddings.weight"),
        dropout=official.drop_rate,
        **_bridge_settings(official, tensors),
    )
    return ModelConfig(
        vision=VisionConfig(**image),
        text=TextConfig(**text),
        fusion=fusion,
        heads=_read_heads(official, tensors, fusion.hidden_size),
    )


def _read_heads(official: Settings, tensors: Mapping[str, Tensor], width: int) -> HeadsConfig:
    """Returns all heads of a file. A fine-tuned file may have heads of several tasks, of one hidden width."""
    tasks = [task for task in ("vqa", "snli", "nlvr2") if f"{task}_classifier.3.weight" in tensors]
    settings: dict[str, Any] = {"nlvr2_dropout": official.nlvr2_drop_rate}
    if tasks:
        # With `task_head_layers=1` there is no hidden layer.
        norm = f"{tasks[0]}_classifier.1.weight"
        hidden_size = extent(tensors, norm) if norm in tensors else 0
        settings["hidden_scale"] = hidden_size / (2 * width)
    if "itc_text_head.fc.weight" in tensors:
        settings |= {"itc": "tower", "itc_size": extent(tensors, "itc_text_head.fc.weight")}
    if "vqa" in tasks:
        settings["vqa"] = extent(tensors, "vqa_classifier.3.weight")
    return HeadsConfig(
        mlm="mlm_score.bias" in tensors,
        itm="itm_score.fc.weight" in tensors,
        rank="rank_output.weight" in tensors,
        snli_ve="snli" in tasks,
        nlvr2="nlvr2" in tasks,
        **settings,
    )


def _bridge_settings(official: Settings, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if "cross_modal_text_manager_tower.0.weights" not in tensors:
        bridge = None if official.model_type == "METER" else "add"
        return {"bridge": bridge, "input_norm": "cross_modal_text_layernorm.weight" in tensors}
    if official.manager_type not in _MANAGERS:
        raise ValueError(
            f"manager_type is {official.manager_type!r}; expected one of {', '.join(_MANAGERS)}"
        )
    settings: dict[str, Any] = {
        "bridge": _MANAGERS[official.manager_type],
        "input_norm": True,
        "layer_embeddings": True,
    }
    for tower, layers in (("text", "text_layers"), ("image", "vision_layers")):
        depth = extent(tensors, f"layer_embeddings_{tower}.weight")
        count = extent(tensors, f"cross_modal_{tower}_manager_tower.0.weights")
        settings[layers] = tuple(range(depth - count + 1, depth + 1))
    return settings
