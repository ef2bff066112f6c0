"""The published architectures, their towers by name, a nano model for CPUs, and the baselines of any model."""

from dataclasses import replace

from bridgetower.model.config import FusionConfig, HeadsConfig, ModelConfig
from bridgetower.model.tower_config import TextConfig, VisionConfig

# OpenAI's CLIP, at the image size that it was trained at.
CLIP_B16 = VisionConfig(image_size=224)
CLIP_B32 = replace(CLIP_B16, patch_size=32)
CLIP_L14 = VisionConfig(
    image_size=224, patch_size=14, hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096
)

# timm's ViT and Facebook's DeiT are one architecture; only distilled DeiTs have a second token.
VIT_B16 = VisionConfig(image_size=224, layer_norm_eps=1e-6, activation="gelu", pre_norm=False, patch_bias=True)
VIT_B32 = replace(VIT_B16, patch_size=32)
VIT_L16 = replace(VIT_B16, hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096)
DEIT_B16 = VIT_B16
DEIT_B16_DISTILLED = replace(DEIT_B16, distillation_token=True)

ROBERTA_BASE = TextConfig()
ROBERTA_LARGE = TextConfig(hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096)
BERT_BASE = TextConfig(
    vocab_size=30522, max_positions=512, type_vocab_size=2, pad_token_id=0, positions="bert", layer_norm_eps=1e-12
)
BERT_LARGE = replace(BERT_BASE, hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096)

VISION_TOWERS: dict[str, VisionConfig] = {
    "clip-b16": CLIP_B16,
    "clip-b32": CLIP_B32,
    "clip-l14": CLIP_L14,
    "vit-b16": VIT_B16,
    "vit-b32": VIT_B32,
    "vit-l16": VIT_L16,
    "deit-b16": DEIT_B16,
    "deit-b16-distilled": DEIT_B16_DISTILLED,
}
TEXT_TOWERS: dict[str, TextConfig] = {
    "roberta-base": ROBERTA_BASE,
    "roberta-large": ROBERTA_LARGE,
    "bert-base": BERT_BASE,
    "bert-large": BERT_LARGE,
}

# Paper, section "Implementation Details": CLIP ViT-B/16 at 288 px, RoBERTa-base, six fusion layers of width 768.
BASE = ModelConfig(vision=replace(CLIP_B16, image_size=288), text=ROBERTA_BASE)

# The same with CLIP ViT-L/14 at 294 px and RoBERTa-large; fusion width 1024.
LARGE = ModelConfig(
    vision=replace(CLIP_L14, image_size=294),
    text=ROBERTA_LARGE,
    fusion=FusionConfig(hidden_size=1024, num_heads=16, intermediate_size=4096),
)

# For two CPU cores and images of emoji size: about 3 M parameters. Dropout costs time and helps nothing at this size.
NANO = ModelConfig(
    vision=VisionConfig(
        image_size=60, patch_size=10, hidden_size=128, num_layers=4, num_heads=4, intermediate_size=512
    ),
    text=TextConfig(
        vocab_size=4096,
        hidden_size=128,
        num_layers=3,
        num_heads=4,
        intermediate_size=512,
        max_positions=66,
        dropout=0.0,
    ),
    fusion=FusionConfig(hidden_size=128, num_layers=2, num_heads=4, intermediate_size=512, dropout=0.0),
    heads=HeadsConfig(itc="tower", itc_size=128),
)


def meter(config: ModelConfig) -> ModelConfig:
    """Returns the METER baseline of `config`: the same encoder, fed from the last tower layers only.

    Source: paper, section "Ablation Study"; official `METERTransformerSS`: neither bridges nor input LayerNorms.
    """
    return replace(config, fusion=replace(_unbridged(config), input_norm=False))


def meter_with_norms(config: ModelConfig) -> ModelConfig:
    """Returns a control between METER and `config`: METER with a LayerNorm wherever `config` has one.

    It has the parameters of BridgeTower, but only the last tower layers reach the encoder: what it gains on METER comes
    from the LayerNorms, what BridgeTower gains on it comes from the tower layers.
    """
    return replace(config, fusion=replace(_unbridged(config), bridge="norm", input_norm=True))


def _unbridged(config: ModelConfig) -> FusionConfig:
    """The fusion encoder without bridges, on the last of the tower layers that are read."""
    vision, text = config.fusion.vision_layers, config.fusion.text_layers
    return replace(config.fusion, bridge=None, vision_layers=vision and vision[-1:], text_layers=text and text[-1:])
