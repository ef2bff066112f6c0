"""Small random towers of the families of timm and transformers."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from safetensors.torch import save_file

from tiny import off_defaults

PIXELS = {
    "input_size": [3, 24, 24],
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
    "interpolation": "bilinear",
}

Draw = Callable[[Random], dict[str, Any]]


@dataclass(frozen=True)
class VisionFamily:
    """An architecture of timm, and how sizes for it are drawn."""

    name: str
    prefix_tokens: int
    arguments: Draw = lambda random: {}
    head_width: int = 4
    patch: int | None = None

    def draw(self, random: Random) -> tuple[dict[str, Any], int]:
        heads, patch = random.randint(2, 4), self.patch or random.choice([4, 6, 8])
        arguments = {
            "embed_dim": heads * self.head_width,
            "depth": random.randint(3, 5),
            "num_heads": heads,
        }
        if self.patch is None:
            arguments["patch_size"] = patch
        return arguments | self.arguments(random), patch * random.randint(3, 5)


VISION_FAMILIES = {
    "vit": VisionFamily("vit_tiny_patch16_224", 1),
    "clip": VisionFamily("vit_base_patch16_clip_224", 1),
    "clip, quick GELU": VisionFamily("vit_base_patch16_clip_quickgelu_224", 1),
    "siglip": VisionFamily("vit_base_patch16_siglip_224", 0),
    "siglip, mean": VisionFamily("vit_base_patch16_siglip_gap_224", 0),
    "siglip 2": VisionFamily("vit_base_patch32_siglip_256", 0),
    "dinov2": VisionFamily("vit_small_patch14_dinov2", 1),
    "dinov2, registers": VisionFamily(
        "vit_small_patch14_reg4_dinov2",
        3,
        lambda random: {"reg_tokens": 2, "init_values": 0.5 + random.random()},
    ),
    "dinov3": VisionFamily("vit_small_patch16_dinov3", 5, head_width=8),
    "dinov3, SwiGLU": VisionFamily("vit_small_plus_patch16_dinov3", 5, head_width=8),
    "eva02": VisionFamily("eva02_tiny_patch14_224", 1, head_width=8),
    "eva02 clip": VisionFamily("eva02_base_patch16_clip_224", 1, head_width=8),
    "eva": VisionFamily("eva_large_patch14_196", 1),
    "deit3": VisionFamily("deit3_small_patch16_224", 1),
    "deit, distilled": VisionFamily("deit_tiny_distilled_patch16_224", 2),
    "beit": VisionFamily("beit_base_patch16_224", 1),
    "beit v2": VisionFamily("beitv2_base_patch16_224", 1),
    "registers, mean": VisionFamily("vit_medium_patch16_reg4_gap_256", 4),
    "parallel": VisionFamily("vit_small_patch16_18x2_224", 1),
    "relative positions": VisionFamily("vit_relpos_small_patch16_224", 0),
    "relative positions, shared": VisionFamily("vit_srelpos_small_patch16_224", 0),
    "relative positions, CLS": VisionFamily("vit_relpos_medium_patch16_cls_224", 1),
    "rotary": VisionFamily("vit_small_patch16_rope_224", 1, head_width=8),
    "rotary, learnt": VisionFamily("vit_small_patch16_rope_mixed_224", 1, head_width=8),
}


def _text(random):
    heads = random.choice([2, 4])
    return {
        "vocab_size": random.randint(60, 90),
        "hidden_size": heads * 8,
        "num_hidden_layers": random.randint(3, 5),
        "num_attention_heads": heads,
        "intermediate_size": random.randint(20, 40),
        "max_position_embeddings": random.randint(24, 40),
        "pad_token_id": 1,
    }


def _modernbert(random):
    tokens = {
        f"{role}_token_id": number
        for number, role in enumerate(["bos", "eos", "cls", "sep"], start=2)
    }
    every = random.randint(2, 3)
    return (
        _text(random)
        | tokens
        | {"local_attention": 2 * random.randint(2, 4), "global_attn_every_n_layers": every}
    )


def _deberta(random):
    return _text(random) | {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": random.choice([4, 8]),
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
        "type_vocab_size": 0,
        "conv_kernel_size": random.choice([0, 3]),
    }


def _distilbert(random):
    drawn = _text(random)
    names = {"hidden_size": "dim", "intermediate_size": "hidden_dim"}
    names |= {"num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
    return {names.get(name, name): value for name, value in drawn.items()}


TEXT_FAMILIES = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "camembert", "deberta", "mpnet", "nomic_bert", "gte"),
        _text,
    ),
    **dict.fromkeys(("rembert", "roformer", "ernie", "data2vec-text"), _text),
    **dict.fromkeys(("electra", "albert"), lambda random: _text(random) | {"embedding_size": 12}),
    **{"modernbert": _modernbert, "deberta-v2": _deberta, "distilbert": _distilbert},
}


def save_timm(folder, family, **pretrained):
    """Writes a small model of timm, with a classifier, to a folder in the form of the hub; returns the model."""
    import timm

    arguments, size = VISION_FAMILIES[family].draw(Random(0))
    name = VISION_FAMILIES[family].name
    arguments |= {"num_classes": 5, "img_size": size}
    model = off_defaults(timm.create_model(name, **arguments)).eval()
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": name, "model_args": arguments, "pretrained_cfg": PIXELS | pretrained}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def save_text(folder, family, name="AutoModel", **changes):
    """Writes a small model of a class of transformers to a folder; returns the model."""
    import transformers

    config = transformers.AutoConfig.for_model(family, **TEXT_FAMILIES[family](Random(0)) | changes)
    model = off_defaults(getattr(transformers, name).from_config(config)).eval()
    model.save_pretrained(folder)
    return model
