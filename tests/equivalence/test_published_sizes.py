"""The published repositories: names and shapes at full size on the meta device, and over the network their outputs."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface as hf
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import BridgeTowerConfig

import bridgetower
import tiny
from bridgetower.checkpoints import Checkpoint, convert, huggingface, read_checkpoint
from bridgetower.processor import Processor, ProcessorConfig, train_tokenizer

# Sizes in config.json of the repositories BridgeTower/NAME on the hub. Those of the large model were read in its stored
# commits 9bdaa4b and 0e15d64. The base models have transformers' defaults, which its documentation calls those of
# bridgetower-base, and of which commit f803af9 of bridgetower-base-itm-mlm shows the sizes of the text tower.
_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}
_SHARED = {
    "num_hidden_layers": 6,
    "layer_norm_eps": 1e-5,
    "link_tower_type": "add",
    "share_cross_modal_transformer_layers": True,
    "share_link_tower_layers": False,
    "tie_word_embeddings": False,
    "logit_scale_init_value": 2.6592,
}
BASE = _SHARED | {
    "hidden_size": 768,
    "text_config": _ROBERTA
    | {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "vision_config": {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 16, "image_size": 288},
}
LARGE = _SHARED | {
    "hidden_size": 1024,
    "contrastive_hidden_size": 512,
    "text_config": _ROBERTA
    | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "vision_config": {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14, "image_size": 294},
}
REPOSITORIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "bridgetower-base": (BASE, ("backbone",)),
    "bridgetower-base-itm-mlm": (BASE, ("mlm", "itm")),
    "bridgetower-large-itm-mlm-itc": (LARGE, ("mlm", "itm", "itc")),
}
KINDS = [(name, kind) for name, (_, kinds) in REPOSITORIES.items() for kind in kinds]
NETWORK = pytest.mark.skipif(
    os.environ.get("BRIDGETOWER_NETWORK_TESTS") != "1", reason="BRIDGETOWER_NETWORK_TESTS=1 loads it from the hub"
)
LOCAL = "local"
TEXTS = ["two dogs in a car", "a man rides"]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_names_and_shapes(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every tensor of transformers' model, those that no computation reads included."""
    values, _ = REPOSITORIES[name]
    with torch.device("meta"):
        theirs = hf.KINDS[kind](BridgeTowerConfig(**values))
    expected = theirs.state_dict()
    monkeypatch.setattr("bridgetower.checkpoints.checkpoint.finite", lambda source, tensors: tensors)  # no values there
    checkpoint = huggingface.read_checkpoint(name, values, expected)
    written, tensors = huggingface.export(checkpoint)
    assert {one: tensor.shape for one, tensor in tensors.items()} == {
        one: tensor.shape for one, tensor in expected.items()
    }
    pooler = sum(tensor.numel() for tensor in checkpoint.extra_tensors.values())
    with torch.device("meta"):
        ours = bridgetower.BridgeTower(checkpoint.config)
    assert sum(parameter.numel() for parameter in ours.parameters()) + pooler == theirs.num_parameters()
    back = BridgeTowerConfig(**written)
    for part in ("", "text_config", "vision_config"):
        described, start = (getattr(one, part) if part else one for one in (back, theirs.config))
        for field in values[part] if part else _SHARED:
            assert getattr(described, field) == getattr(start, field), field


def outputs(checkpoint: Checkpoint, kind: str, batch: hf.Inputs) -> dict[str, Tensor]:
    """What transformers' class of a kind computes, here; a checkpoint may have several heads."""
    model = checkpoint.model()
    image, text = model.encode_image(batch.pixel_values), model.encode_text(batch.input_ids, batch.attention_mask)
    fused = model.fuse(image, text, "all")
    if kind == "itc":
        vectors = {"image": model.image_embeds(image), "text": model.text_embeds(text)}
        vectors["pair"] = model.pair_embeds(fused.pooled)
        return vectors | {"logit_scale": model.contrastive_head().logit_scale()}
    if kind == "backbone":
        return {"text": fused.text, "image": fused.image, "pooled": fused.pooled}
    return {"logits": model.mlm_logits(fused.text) if kind == "mlm" else model.itm_logits(fused.pooled)}


def worst(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference, relative to the largest value of the output."""
    assert ours.keys() == theirs.keys()
    return max(tiny.off(ours[name], theirs[name]) / max(1.0, float(theirs[name].abs().max())) for name in ours)


def local(folder: Path, kind: str) -> str:
    """A folder as the hub has them, of a small model."""
    hf.random_model(kind, {"text.vocab_size": 280}).save_pretrained(folder / "theirs")
    tokenizer = train_tokenizer(TEXTS * 3, vocab_size=280)
    processor = Processor(ProcessorConfig(profile="hf", image_size=32, size_divisor=16, max_length=18), tokenizer)
    read = read_checkpoint(folder / "theirs")
    filled = Checkpoint(
        source=read.source,
        config=read.config,
        tensors=read.tensors,
        extra_tensors=read.extra_tensors,
        processor=processor,
    )
    convert(filled, folder / "hub", "hf")
    return str(folder / "hub")


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((LOCAL, kind) for kind in hf.KINDS), *(pytest.param(*case, marks=NETWORK) for case in KINDS)],
)
def test_outputs_on_two_images(name: str, kind: str, tmp_path: Path) -> None:
    source = local(tmp_path, kind) if name == LOCAL else f"BridgeTower/{name}"
    checkpoint = read_checkpoint(source)
    assert checkpoint.processor is not None
    random = np.random.default_rng(3)
    images = [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((300, 400), (350, 299))]
    texts = checkpoint.processor.texts(TEXTS)
    assert texts.attention_mask is not None
    batch = hf.Inputs(checkpoint.processor.images(images), texts.input_ids, texts.attention_mask)
    theirs = hf.KINDS[kind].from_pretrained(source).eval()
    with torch.no_grad():
        expected = hf.their_outputs(theirs, batch)
        assert worst(outputs(checkpoint, kind, batch), expected) < 1e-4
        other = hf.Inputs(batch.pixel_values.flip(0), batch.input_ids, batch.attention_mask)
        assert worst(outputs(checkpoint, kind, other), expected) > 1e-3
