"""Names of published towers: a tensor each, and no kind taken for another."""

import pytest
import torch

from bridgetower.checkpoints.keymap import NAMINGS, TowerNaming, recognise
from bridgetower.model.tower_config import TextConfig, VisionConfig
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


def label(naming: TowerNaming) -> str:
    return f"{naming.kind}-{naming.prefix}"


@pytest.mark.parametrize("naming", NAMINGS, ids=label)
class TestEveryKind:
    def test_no_foreign_name_serves_twice(self, naming: TowerNaming) -> None:
        names = foreign_names(naming)
        assert len(names) == len(set(names))
        assert all(name.startswith(naming.prefix) for name in names)
        assert naming.prefix + naming.marker in names

    def test_is_told_from_the_others(self, naming: TowerNaming) -> None:
        tensors = dict.fromkeys(foreign_names(naming), torch.ones(()))
        assert recognise(tensors, naming.part) == naming
        assert recognise(tensors, "text" if naming.part == "vision" else "vision") is None

    def test_find(self, naming: TowerNaming) -> None:
        name = f"{naming.part}.layers.1.attention.qkv.weight"
        first = naming.table([name])[name].names[0]
        tensor = torch.ones(2)
        assert naming.find({first: tensor}, name) is tensor
        assert naming.find({}, name) is None
