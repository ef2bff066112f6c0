"""The published architectures, a nano one for CPUs, and the METER baseline of any of them."""

from dataclasses import replace

from bridgetower.model.config import FusionConfig, HeadsConfig, ModelConfig, TextConfig, VisionConfig

# Paper, section "Implementation Details": CLIP ViT-B/16 at 288 px, RoBERTa-base, six fusion layers of width 768.
BASE = ModelConfig()

# The same with CLIP ViT-L/14 at 294 px and RoBERTa-large; fusion width 1024.
LARGE = ModelConfig(
    vision=VisionConfig(
        image_size=294, patch_size=14, hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096
    ),
    text=TextConfig(hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096),
    fusion=FusionConfig(hidden_size=1024, num_heads=16, intermediate_size=4096),
)

# For two CPU cores and pictures of emoji size: about 3 M parameters. Dropout costs time and helps nothing at this size.
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

    Source: paper, section "Ablation Study"; official `meter_fusion`, which has neither bridges nor input LayerNorms.
    """
    fusion = replace(config.fusion, bridge=None, input_norm=False, vision_layers=None, text_layers=None)
    return replace(config, fusion=fusion)
