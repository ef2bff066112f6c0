"""A run with a tower, a bridge and a custom head: trained, continued, started from, loaded."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bridgetower
import shapes
from bridgetower.checkpoints import read_checkpoint
from bridgetower.training.run import train
from bridgetower.training.start import starting_checkpoint
from own_modules import OWN


def test_from_scratch_to_use(tiny_dataset: Path, tmp_path: Path) -> None:
    model = shapes.MODEL.override(
        {"vision.architecture": "patches", "vision.prefix_tokens": 0, "fusion.bridge": "manager"}
        | {
            "vision.num_layers": 3,
            "text.num_layers": 3,
            "fusion.vision_layers": (1, 2, 3),
            "fusion.text_layers": (1, 2, 3),
            "heads.own": ("mood",),
        }
    )
    config = shapes.run_config(tiny_dataset, model=model, max_steps=2)
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=r"vision\.architecture is 'patches'; expected one of vit, timm, or a custom"):
        train(config, tmp_path / "without", progress=False)
    metrics = train(config, out, extensions=OWN, progress=False)
    assert train(config, out, extensions=OWN, resume=True, progress=False) == metrics

    drawn, trained = starting_checkpoint(config, extensions=OWN), read_checkpoint(out / "last", extensions=OWN)
    for name in ("vision.blocks.0.weight", "fusion.text_bridges.0.weigh.weight", "text.layers.0.mlp.up.weight"):
        assert not torch.equal(drawn.tensors[name], trained.tensors[name]), name

    again = replace(config, init=str(out), model=replace(config.model, heads=replace(model.heads, itm=False)))
    started = starting_checkpoint(again, extensions=OWN)
    assert torch.equal(started.tensors["mood_head.weight"], trained.tensors["mood_head.weight"])
    assert not any(name.startswith("itm_head.") for name in started.tensors)

    predictor = bridgetower.load(out, extensions=OWN)
    assert predictor.embed_texts(["red bar", "blue ring"]).shape == (2, model.heads.itc_size)
