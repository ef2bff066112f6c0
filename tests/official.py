"""Files as the official code writes them, made from small models of this package."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tiny
from bridgetower.checkpoints.keymap import export_tensors, name_table
from bridgetower.model.config import FusionConfig, ModelConfig, TextConfig, VisionConfig

# As CLIP, RoBERTa and transformers would have it: heads of width 64 in the image tower, a fusion encoder like the text
# tower.
CONFIG = ModelConfig(
    vision=VisionConfig(
        image_size=32,
        patch_size=16,
        hidden_size=128,
        num_layers=3,
        num_heads=2,
        intermediate_size=512,
    ),
    text=TextConfig(
        vocab_size=60,
        hidden_size=48,
        num_layers=3,
        num_heads=3,
        intermediate_size=56,
        max_positions=20,
        dropout=0.1,
    ),
    fusion=FusionConfig(hidden_size=48, num_layers=2, num_heads=3, intermediate_size=56),
)
OVERRIDES = {"text.num_heads": 3}  # an official file tells the heads of published widths only
METER = {"fusion.bridge": None, "fusion.input_norm": False}
BERT = {
    "text.positions": "bert",
    "text.pad_token_id": 0,
    "text.layer_norm_eps": 1e-12,
    "text.type_vocab_size": 2,
}
TIMM = {
    "vision.activation": "gelu",
    "vision.pre_norm": False,
    "vision.patch_bias": True,
    "vision.layer_norm_eps": 1e-6,
}


@dataclass(frozen=True)
class Official:
    config: ModelConfig
    tensors: dict[str, Tensor]
    state_dict: dict[str, Tensor]
    run_config: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> Path:
        content = {
            "epoch": 3,
            "global_step": 1234,
            "pytorch-lightning_version": "1.5.10",
            "state_dict": self.state_dict,
            "callbacks": {},
            "optimizer_states": [],
            "lr_schedulers": [],
            "hparams_name": "kwargs",
            "hyper_parameters": {"config": self.run_config},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
        return path


def make(changes=None, *, extra=(), seed=0):
    config = CONFIG.override(changes or {})
    naming = "timm" if config.vision.patch_bias else "clip"
    tensors = tiny.build(config, seed).state_dict()
    width, generator = config.text.hidden_size, torch.Generator().manual_seed(seed)
    extra_tensors = {
        "text.pooler.dense.weight": torch.rand(width, width, generator=generator),
        "text.pooler.dense.bias": torch.rand(width, generator=generator),
    }
    state_dict = {"temperature": torch.tensor(0.07)}
    state_dict |= export_tensors(
        name_table([*tensors, *extra_tensors], naming), tensors | extra_tensors
    )
    if not config.heads.hidden_scale:  # official `task_head_layers=1`
        state_dict = {
            name.replace("_classifier.3.", "_classifier.0."): one
            for name, one in state_dict.items()
        }
    state_dict["text_transformer.embeddings.position_ids"] = torch.arange(
        config.text.max_positions
    )[None]
    if naming == "clip":
        left_over = ("positional_embedding", "ln_final.weight", "ln_final.bias")
        state_dict |= {
            f"vit_model.{name}": torch.rand(4, generator=generator) for name in left_over
        }
    state_dict |= {name: torch.rand(3, generator=generator) for name in extra}
    return Official(config, tensors, state_dict, run_config(config))


def run_config(config):
    clip = not config.vision.patch_bias
    patch = config.vision.patch_size
    return {
        "exp_name": "BT",
        "loss_names": {
            "mlm": int(config.heads.mlm),
            "itm": int(config.heads.itm),
            "itc": int(bool(config.heads.itc)),
        },
        "train_transform_keys": ["clip"],
        "val_transform_keys": ["clip"],
        "image_size": config.vision.image_size,
        "patch_size": patch,
        "resolution_before": 224,
        "max_text_len": 12,
        "tokenizer": "roberta-base" if config.text.positions == "roberta" else "bert-base-uncased",
        "vocab_size": config.text.vocab_size,
        "input_image_embed_size": config.vision.hidden_size,
        "input_text_embed_size": config.text.hidden_size,
        "vit": f"CLIP-ViT-B/{patch}" if clip else f"vit_base_patch{patch}_224",
        "hidden_size": config.fusion.hidden_size,
        "num_heads": config.fusion.num_heads,
        "num_layers": config.fusion.num_layers,
        "mlp_ratio": 4,
        "drop_rate": config.fusion.dropout,
        "meter_fusion": False,
        "vit_remove_last": False,
        "model_type": "METER" if config.fusion.bridge is None else "BT",
        "nlvr2_drop_rate": config.heads.nlvr2_dropout,
        "vit_layernorm_shared": True,
        "contrastive_hidden_size": config.heads.itc_size,
        "temperature": 0.07,
    }
