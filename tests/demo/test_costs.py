"""Cost of a model against formulas written down by hand."""

import pytest

from bridgetower.model.config import ModelConfig
from bridgetower.model.cpu import optimize_for_cpu
from bridgetower.model.presets import meter
from bridgetower_demo.costs import flops_by_part, parameters_by_part
from helpers.models import SMALL_CONFIG, build_model, changed_config

LENGTH = 7


def tower(tokens: int, width: int, intermediate: int, layers: int) -> int:
    """Multiply-adds of transformer layers: of projections, of scores and sums, and of the feed-forward."""
    return layers * (
        4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * intermediate
    )


def fusion_stream(size: int, other: int, queries: int, width: int, intermediate: int) -> int:
    """Multiply-adds of one fusion layer of one stream that is read at its first `queries` positions."""
    self_attention = 2 * queries * width**2 + 2 * size * width**2 + 2 * queries * size * width
    cross_attention = 2 * queries * width**2 + 2 * other * width**2 + 2 * queries * other * width
    return self_attention + cross_attention + 2 * queries * width * intermediate


def expected_flops(config: ModelConfig, text: int) -> dict[str, int]:
    vision = config.vision
    fusion = config.fusion
    width = fusion.hidden_size
    layers = fusion.num_layers
    bridged = fusion.num_bridged_layers
    patch_count = (vision.image_size // vision.patch_size) ** 2
    image = patch_count + (2 if vision.distillation_token else 1)
    streams = [
        fusion_stream(size, other, size if layer < layers else 1, width, fusion.intermediate_size)
        for layer in range(1, layers + 1)
        for size, other in ((image, text), (text, image))
    ]
    projections = bridged * width * (image * vision.hidden_size + text * config.text.hidden_size)
    patches = patch_count * 3 * vision.patch_size**2 * vision.hidden_size
    multiply_adds = {
        "image tower": patches
        + tower(image, vision.hidden_size, vision.intermediate_size, vision.num_layers),
        "text tower": tower(
            text, config.text.hidden_size, config.text.intermediate_size, config.text.num_layers
        ),
        "fusion encoder": projections + sum(streams) + 2 * width**2,
        "heads": 2 * width * 2,
    }
    return {name: 2 * count for name, count in multiply_adds.items()}


@pytest.mark.parametrize(
    "config",
    [SMALL_CONFIG, meter(SMALL_CONFIG), changed_config(vision__distillation_token=True)],
    ids=["bridgetower", "meter", "distilled"],
)
def test_flops_equal_the_formula(config):
    model = build_model(config)
    assert flops_by_part(model, LENGTH) == expected_flops(config, LENGTH)
    optimize_for_cpu(model)
    assert flops_by_part(model, LENGTH) == expected_flops(config, LENGTH)


def test_parameters_add_up():
    model = build_model()
    counts = parameters_by_part(model)
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())
    width = SMALL_CONFIG.fusion.hidden_size
    vocab = SMALL_CONFIG.text.vocab_size
    mlm = width**2 + width + 2 * width + width * vocab + vocab
    itc = 12 * (SMALL_CONFIG.vision.hidden_size + SMALL_CONFIG.text.hidden_size + 2) + 1
    assert counts["heads"] == mlm + itc + 2 * width * 2 + 2
    assert counts["image tower"] == sum(
        parameter.numel() for parameter in model.vision.parameters()
    )
