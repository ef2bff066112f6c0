"""Configs of the published models and towers, of a nano model for CPUs, and of the METER baselines."""

from dataclasses import replace
from typing import Any

from bridgetower.model.config import (
    FusionConfig,
    HeadsConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)

# OpenAI's CLIP, at the image size that it was trained at.
CLIP_B16 = VisionConfig(image_size=224)
# timm's ViT and Facebook's DeiT are one architecture; only distilled DeiTs have a second token.
VIT_B16 = VisionConfig(
    image_size=224, layer_norm_eps=1e-6, activation="gelu", pre_norm=False, patch_bias=True
)
ROBERTA_BASE = TextConfig()
BERT_BASE = TextConfig(
    vocab_size=30522,
    max_positions=512,
    type_vocab_size=2,
    pad_token_id=0,
    positions="bert",
    layer_norm_eps=1e-12,
)

_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_layers": 24,
    "num_heads": 16,
    "intermediate_size": 4096,
}

VISION_TOWERS: dict[str, VisionConfig] = {
    "clip-b16": CLIP_B16,
    "clip-b32": replace(CLIP_B16, patch_size=32),
    "clip-l14": replace(CLIP_B16, patch_size=14, **_LARGE),
    "vit-b16": VIT_B16,
    "vit-b32": replace(VIT_B16, patch_size=32),
    "vit-l16": replace(VIT_B16, **_LARGE),
    "deit-b16": VIT_B16,
    "deit-b16-distilled": replace(VIT_B16, distillation_token=True),
}
TEXT_TOWERS: dict[str, TextConfig] = {
    "roberta-base": ROBERTA_BASE,
    "roberta-large": replace(ROBERTA_BASE, **_LARGE),
    "bert-base": BERT_BASE,
    "bert-large": replace(BERT_BASE, **_LARGE),
}

# Paper, section "Implementation Details": CLIP ViT-B/16 at 288 px, RoBERTa-base, six fusion layers of width 768.
BASE = ModelConfig(vision=replace(CLIP_B16, image_size=288), text=ROBERTA_BASE)

# The same with CLIP ViT-L/14 at 294 px and RoBERTa-large; fusion width 1024.
LARGE = ModelConfig(
    vision=replace(VISION_TOWERS["clip-l14"], image_size=294),
    text=TEXT_TOWERS["roberta-large"],
    fusion=FusionConfig(hidden_size=1024, num_heads=16, intermediate_size=4096),
)

# For two CPU cores and images of emoji size: about 3 M parameters. Dropout costs time and helps nothing at this size.
_NANO: dict[str, Any] = {"hidden_size": 128, "num_heads": 4, "intermediate_size": 512}
NANO = ModelConfig(
    vision=VisionConfig(image_size=60, patch_size=10, num_layers=4, **_NANO),
    text=TextConfig(vocab_size=4096, num_layers=3, max_positions=66, dropout=0.0, **_NANO),
    fusion=FusionConfig(num_layers=2, dropout=0.0, **_NANO),
    heads=HeadsConfig(itc="tower", itc_size=128),
)


def meter(config: ModelConfig, bridge: str | None = None) -> ModelConfig:
    """Returns the METER baseline of `config` (official `METERTransformerSS`): neither bridges nor input LayerNorms."""
    fusion = replace(
        config.fusion,
        bridge=bridge,
        input_norm=bridge is not None,
        vision_layers=_last_layer(config.fusion.vision_layers),
        text_layers=_last_layer(config.fusion.text_layers),
    )
    return replace(config, fusion=fusion)


def _last_layer(layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if layers is None else layers[-1:]


def meter_with_norms(config: ModelConfig) -> ModelConfig:
    """Returns a control between METER and `config`: METER with a LayerNorm wherever `config` has one."""
    return meter(config, "norm")
