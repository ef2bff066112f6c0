"""What tensors do not show: the libraries' own defaults, and the heads of timm's towers."""

from typing import Any

import pytest

from bridgetower.checkpoints.keymap import PUBLISHED_HEADS, Kind, text_settings, vision_settings
from bridgetower.model.presets import BERT_BASE, ROBERTA_BASE, VISION_TOWERS


def told(kind: Kind, values: dict[str, Any]) -> dict[str, Any]:
    return dict(vision_settings("x", kind, values, 768)[0] if kind != "bert" else text_settings("x", values))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("clip", "CLIPVisionConfig"),
        ("clip", "CLIPConfig"),
        ("vit", "ViTConfig"),
        ("vit", "DeiTConfig"),
        ("bert", "RobertaConfig"),
        ("bert", "BertConfig"),
    ],
)
def test_a_config_that_names_only_what_differs(kind: Kind, name: str) -> None:
    """The defaults are those of transformers."""
    whole = getattr(pytest.importorskip("transformers"), name)().to_dict()
    assert told(kind, {"model_type": whole["model_type"]}) == told(kind, whole)


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_small_patch16_224",
        "vit_base_patch16_224",
        "vit_base_patch32_224",
        "vit_large_patch16_224",
        "vit_huge_patch14_224",
        "deit_base_patch16_224",
        "deit_small_distilled_patch16_224",
    ],
)
def test_timm(name: str) -> None:
    model = pytest.importorskip("timm").create_model(name, depth=1)
    usual = vision_settings("x", "timm", {}, model.embed_dim)[1]
    assert usual == {
        "num_heads": model.blocks[0].attn.num_heads,
        "activation": type(model.blocks[0].mlp.act).__name__.lower(),
        "layer_norm_eps": model.norm.eps,
    }


def test_they_agree_with_the_presets() -> None:
    for preset in (VISION_TOWERS["clip-b16"], VISION_TOWERS["clip-l14"]):
        usual = vision_settings("x", "openai", {}, preset.hidden_size)[1]
        assert usual == {name: getattr(preset, name) for name in usual}
    for preset in (VISION_TOWERS["vit-b16"], VISION_TOWERS["vit-l16"]):
        usual = vision_settings("x", "timm", {}, preset.hidden_size)[1]
        assert usual == {name: getattr(preset, name) for name in usual}
    for text in (BERT_BASE, ROBERTA_BASE):
        assert PUBLISHED_HEADS[text.hidden_size] == text.num_heads
