"""A tower of timm with a text tower of transformers: trained, saved, loaded and exported to ONNX."""

import shutil
import socket
from dataclasses import replace

import pytest
import torch

import bridgetower
from bridgetower.checkpoints import read_checkpoint
from bridgetower.tasks.table import RECIPES
from bridgetower.training.run import train
from bridgetower.training.setup import starting_checkpoint
from helpers.checkpoints import save_text_family, save_timm_family
from helpers.models import max_difference
from helpers.servers import SERVED_TEXTS
from helpers.shapes import SHAPES_MODEL, shapes_run_config

for package in ("timm", "transformers", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)
SPELLED = {"<s>": "[CLS]", "<pad>": "[PAD]", "</s>": "[SEP]", "<unk>": "[UNK]", "<mask>": "[MASK]"}


@pytest.fixture(scope="module")
def text_tower(tmp_path_factory, tiny_checkpoint):
    """A ModernBERT with the tokenizer of the set, whose special tokens have ModernBERT's names."""
    folder = tmp_path_factory.mktemp("modernbert")
    save_text_family(folder, "modernbert", vocab_size=310, num_hidden_layers=1)
    tokenizer = (tiny_checkpoint / "tokenizer.json").read_text()
    for ours, theirs in SPELLED.items():
        tokenizer = tokenizer.replace(f'"{ours}"', f'"{theirs}"')
    (folder / "tokenizer.json").write_text(tokenizer)
    return str(folder)


def run_of(dataset, vision, text):
    recipe = RECIPES["pretrain-nano"]
    model = replace(recipe.model, fusion=replace(SHAPES_MODEL.fusion, hidden_size=12, num_layers=1))
    changes = {"recipe": recipe.recipe, "model": model, "vision": vision, "text": text}
    return shapes_run_config(dataset, **changes, max_steps=2)


@pytest.mark.slow
def test_from_weights_to_an_export(tiny_dataset, text_tower, tmp_path, monkeypatch, run):
    save_timm_family(tmp_path / "tower", "siglip")
    config = run_of(tiny_dataset, f"timm:{tmp_path / 'tower'}", text_tower)
    start = starting_checkpoint(config)
    assert (start.config.vision.architecture, start.config.text.architecture) == (
        "timm",
        "transformers",
    )
    assert (
        start.config.vision.hidden_size
        != start.config.text.hidden_size
        != start.config.fusion.hidden_size
    )
    assert start.processor is not None
    assert start.processor.config.interpolation == "bilinear"
    assert (
        start.processor.config.image_size
        == start.config.vision.image_size
        != config.model.vision.image_size
    )
    train(config, tmp_path / "run", progress=False)
    shutil.rmtree(tmp_path / "tower")  # the checkpoint needs nothing else, and no network
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked for a network"))
    trained = read_checkpoint(tmp_path / "run")
    assert trained.config == start.config
    towers = [name for name in trained.tensors if name.startswith(("vision.", "text."))]
    assert (
        sum(not torch.equal(trained.tensors[name], start.tensors[name]) for name in towers)
        > len(towers) // 2
    )

    monkeypatch.undo()
    pictures = sorted(tiny_dataset.parent.glob("*.png"))[:3]
    model = bridgetower.load(tmp_path / "run")
    run("export", tmp_path / "run", tmp_path / "onnx")
    exported = bridgetower.load(tmp_path / "onnx", engine="onnxruntime")
    matches = [
        torch.as_tensor(predictor.match(pictures, SERVED_TEXTS)) for predictor in (model, exported)
    ]
    assert max_difference(*matches) < 1e-4
    assert (
        max_difference(model.embed_texts(SERVED_TEXTS), exported.embed_texts(SERVED_TEXTS)) < 1e-4
    )
    with torch.no_grad():  # control
        model.model.text.get_parameter("model.layers.0.mlp.Wo.weight").mul_(3)
    assert (
        max_difference(model.embed_texts(SERVED_TEXTS), exported.embed_texts(SERVED_TEXTS)) > 1e-3
    )
