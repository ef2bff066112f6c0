"""The authors' `.ckpt` files, of BridgeTower, METER and ManagerTower: config and names."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
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
    name_table,
    official_towers,
    settings,
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

# Left-overs of CLIP's text side and of timm's classifier, buffers, and what managers never read.
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
    """What is read of the official run config, with defaults of METER's code, which has no such options."""

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


def read_checkpoint(
    source: str,
    run_config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    overrides: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> Checkpoint:
    official = known_fields(Settings, run_config, f"{source}: hyper_parameters.config")
    naming: Naming = "timm" if "vit_model.cls_token" in tensors else "clip"
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
    try:
        tensors = _split(tensors)
        config = _model_config(source, official, tensors, naming, overrides).override(overrides)
    except KeyError as error:
        raise ValueError(
            f"{source} lacks {error}; expected an official BridgeTower, METER or ManagerTower checkpoint"
        ) from error
    extra_names = [
        name for name in extra_tensor_names(config) if naming == "clip" or "text." in name
    ]
    tables = name_table(parameter_shapes(config), naming), name_table(extra_names, naming)
    checkpoint = collect(source, config, tensors, *tables, _DROPPABLE, dtype)
    # The official evaluation transform: `clip` crops, `blip` and `albef` squash; the tokenizer is only named.
    squashes = any("blip" in key or "albef" in key for key in official.val_transform_keys)
    preprocessing = ProcessorConfig(
        profile="official-finetune" if squashes else "official-pretrain",
        image_size=config.vision.image_size,
        max_length=official.max_text_len,
    )
    return replace(checkpoint, processor=Processor(preprocessing, None))


def _split(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors, with what is one in a file and two in this package apart, and one name for each head."""
    split = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^cross_modal_(itc_(?:text|image)_head\.)", r"\1", name)
        # one layer: it takes the place of the last of two
        task, _, rest = name.partition("_classifier.0.")
        if rest and f"{task}_classifier.3.weight" not in tensors:
            name = f"{task}_classifier.3.{rest}"
        manager, of_manager, part = name.partition(".manager_layer.")
        if not of_manager:
            split[name] = tensor
            continue
        width = extent(tensors, f"{manager}.manager_layer.LayerNorm.0.weight")
        norms = (
            sum(other.startswith(f"{manager}.manager_layer.LayerNorm.") for other in tensors) // 2
        )
        # the last norm is that of the stream
        layers = norms if manager.endswith("_tower.0") else norms - 1
        # [1, layers (+ 1), 1, width or 1]; adaptive managers have the last row
        if part.startswith("layer_scores"):
            rows = tensor.reshape(extent(tensors, name, 1), -1).expand(-1, width)
            if part == "layer_scores":
                split[f"{manager}.weights"] = rows[:layers].clone()
                rows = rows[layers:]
            if len(rows):
                split[f"{manager}.stream_weight"] = rows[0].clone()
        elif part == "softmax_temperature":
            split[f"{manager}.temperature"] = tensor.reshape(1)
        else:
            part = (
                part.replace(f"LayerNorm.{layers}.", "stream_norm.")
                if part.startswith("LayerNorm")
                else part
            )
            for theirs, ours in _MANAGER_MODULES.items():
                part = part.replace(theirs, ours)
            split[f"{manager}.{part}"] = tensor
    return split


def _model_config(
    source: str,
    official: Settings,
    tensors: Mapping[str, Tensor],
    naming: Naming,
    overrides: Mapping[str, Any],
) -> ModelConfig:
    """Returns the config by the shapes of the tensors and what the run config tells."""
    if official.meter_fusion:
        raise ValueError(
            "the official option meter_fusion is not supported; expected model_type BT or METER without it"
        )
    image, words = (known.sizes(source, tensors) for known in official_towers(naming))
    image |= settings(source, "timm" if naming == "timm" else "openai", {}, image["hidden_size"])[1]
    if "roberta" in official.tokenizer:
        words |= {"positions": "roberta", "pad_token_id": 1, "layer_norm_eps": 1e-5}
    else:
        words |= {"positions": "bert", "pad_token_id": 0, "layer_norm_eps": 1e-12}
    for tower, told in (("vision", image), ("text", words)):
        usual = told.get("num_heads") or PUBLISHED_HEADS.get(told["hidden_size"])
        told["num_heads"] = overrides.get(f"{tower}.num_heads") or usual
        # the official code takes them from the tower's name, which a file lacks
        if told["num_heads"] is None:
            raise ValueError(
                f"an official checkpoint does not store the attention heads of its {tower} tower of width "
                f"{told['hidden_size']}; pass overrides={{'{tower}.num_heads': ...}}"
            )
    size = partial(extent, tensors)
    fusion = FusionConfig(
        hidden_size=size("cross_modal_text_transform.weight"),
        num_layers=len(
            {name.split(".")[1] for name in tensors if name.startswith("cross_modal_text_layers.")}
        ),
        num_heads=official.num_heads,
        intermediate_size=size("cross_modal_text_layers.0.intermediate.dense.weight"),
        num_token_types=size("token_type_embeddings.weight"),
        dropout=official.drop_rate,
        **_bridges(official, tensors),
    )
    # Every head that the file has; fine-tuned ones may carry those of several tasks, of one inner width.
    tasks = [task for task in ("vqa", "snli", "nlvr2") if f"{task}_classifier.3.weight" in tensors]
    norms = [f"{task}_classifier.1.weight" for task in tasks]
    inner = [size(norm) if norm in tensors else 0 for norm in norms]  # 0: `task_head_layers=1`
    itc = "itc_text_head.fc.weight"
    heads = HeadsConfig(
        mlm="mlm_score.bias" in tensors,
        itm="itm_score.fc.weight" in tensors,
        itc="tower" if itc in tensors else None,
        itc_size=size(itc) if itc in tensors else HeadsConfig.itc_size,
        rank="rank_output.weight" in tensors,
        vqa=size("vqa_classifier.3.weight") if "vqa" in tasks else 0,
        snli_ve="snli" in tasks,
        nlvr2="nlvr2" in tasks,
        hidden_scale=inner[0] / (2 * fusion.hidden_size) if inner else HeadsConfig.hidden_scale,
        nlvr2_dropout=official.nlvr2_drop_rate,
    )
    return ModelConfig(
        vision=VisionConfig(**image), text=TextConfig(**words), fusion=fusion, heads=heads
    )


def _bridges(official: Settings, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if "cross_modal_text_manager_tower.0.weights" not in tensors:
        bridge = None if official.model_type == "METER" else "add"
        return {"bridge": bridge, "input_norm": "cross_modal_text_layernorm.weight" in tensors}
    if official.manager_type not in _MANAGERS:
        raise ValueError(
            f"manager_type is {official.manager_type!r}; expected one of {', '.join(_MANAGERS)}"
        )
    managed: dict[str, Any] = {
        "bridge": _MANAGERS[official.manager_type],
        "input_norm": True,
        "layer_embeddings": True,
    }
    for part, ours in (("text", "text_layers"), ("image", "vision_layers")):
        depth = extent(tensors, f"layer_embeddings_{part}.weight")
        count = extent(tensors, f"cross_modal_{part}_manager_tower.0.weights")
        managed[ours] = tuple(range(depth - count + 1, depth + 1))
    return managed
