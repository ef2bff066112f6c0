"""Names of published towers, no kind taken for another, and what tensors do not show: the libraries' own defaults."""

from typing import Any

import pytest
import torch

from bridgetower.checkpoints.keymap import NAMINGS, PUBLISHED_HEADS, Kind, TowerNaming, recognise, settings
from bridgetower.model.config import TextConfig, VisionConfig
from bridgetower.model.presets import BERT_BASE, ROBERTA_BASE, VISION_TOWERS
from bridgetower.model.towers import TextTransformer, VisionTransformer


def tower_names(naming: TowerNaming) -> list[str]:
    """Our names of a tower of two layers of this kind."""
    clip = naming.kind in ("openai", "clip")
    vision = VisionConfig(num_layers=2, pre_norm=clip, patch_bias=not clip, distillation_token=not clip)
    with torch.device("meta"):
        tower = TextTransformer(TextConfig(num_layers=2)) if naming.part == "text" else VisionTransformer(vision)
    return [f"{naming.part}.{name}" for name in tower.state_dict()]


def foreign_names(naming: TowerNaming) -> list[str]:
    return [name for source in naming.table(tower_names(naming)).values() for name in source.names]


@pytest.mark.parametrize("naming", NAMINGS, ids=lambda naming: f"{naming.kind}-{naming.prefix}")
def test_every_kind(naming: TowerNaming) -> None:
    names = foreign_names(naming)
    assert len(names) == len(set(names))
    assert all(name.startswith(naming.prefix) for name in names)
    assert naming.prefix + naming.marker in names
    tensors = dict.fromkeys(names, torch.ones(()))
    assert recognise(tensors, naming.part) == naming
    assert recognise(tensors, "text" if naming.part == "vision" else "vision") is None
    name = f"{naming.part}.layers.1.attention.qkv.weight"
    assert naming.find({naming.table([name])[name].names[0]: tensors[names[0]]}, name) is tensors[names[0]]
    assert naming.find({}, name) is None


def told(kind: Kind, values: dict[str, Any]) -> dict[str, Any]:
    return settings("x", kind, values, 768)[0]


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
    usual = settings("x", "timm", {}, model.embed_dim)[1]
    assert usual == {
        "num_heads": model.blocks[0].attn.num_heads,
        "activation": type(model.blocks[0].mlp.act).__name__.lower(),
        "layer_norm_eps": model.norm.eps,
    }


def test_they_agree_with_the_presets() -> None:
    for preset in (VISION_TOWERS["clip-b16"], VISION_TOWERS["clip-l14"]):
        usual = settings("x", "openai", {}, preset.hidden_size)[1]
        assert usual == {name: getattr(preset, name) for name in usual}
    for preset in (VISION_TOWERS["vit-b16"], VISION_TOWERS["vit-l16"]):
        usual = settings("x", "timm", {}, preset.hidden_size)[1]
        assert usual == {name: getattr(preset, name) for name in usual}
    for text in (BERT_BASE, ROBERTA_BASE):
        assert PUBLISHED_HEADS[text.hidden_size] == text.num_heads
