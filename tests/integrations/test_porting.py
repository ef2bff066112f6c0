"""Code for transformers and what docs/integrations.md puts in its place give the same numbers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from bridgetower.checkpoints import convert, read_checkpoint
from bridgetower.predictor import load
from bridgetower.processor import Processor
from shapes import MODEL, write_tiny_checkpoint

transformers = pytest.importorskip("transformers")

TEXTS = ["red circle on black", "a bar", "a square that is blue"]


WIDTHS = {"hidden_size": 64, "num_heads": 1, "intermediate_size": 256}  # that transformers can hold


@pytest.fixture(scope="module")
def folder(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of transformers."""
    base = tmp_path_factory.mktemp("transformers")
    parts = {f"{part}.{name}": width for part in ("vision", "text", "fusion") for name, width in WIDTHS.items()}
    own = write_tiny_checkpoint(tiny_dataset, base / "own", MODEL.override({**parts, "heads.itc": "fused"}))
    checkpoint = read_checkpoint(own)
    assert checkpoint.processor is not None
    config = replace(checkpoint.processor.config, profile="hf", size_divisor=10)
    processor = Processor(config, checkpoint.processor.tokenizer)
    convert(replace(checkpoint, processor=processor), base / "hf", "hf")
    return str(base / "hf")


def test_before_and_after(folder: str) -> None:
    images = [Image.effect_noise((40 + 9 * number, 50), 60).convert("RGB") for number in range(3)]

    processor = transformers.BridgeTowerProcessor.from_pretrained(folder)
    theirs = transformers.BridgeTowerForContrastiveLearning.from_pretrained(folder)
    inputs = processor(images, TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        outputs = theirs.eval()(**inputs)
        fused = theirs.bridgetower(**inputs)

    model = load(folder, device="cpu")
    for found, expected in (
        (model.embed_texts(TEXTS), outputs.text_embeds),
        (model.embed_images(images), outputs.image_embeds),
        (model.embed_pairs(images, TEXTS), outputs.cross_embeds),
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    ours = model.processor(images, TEXTS, padding=True)
    torch.testing.assert_close(dict(ours), dict(inputs))
    with torch.inference_mode():
        image = model.model.encode_image(ours.pixel_values)
        text = model.model.encode_text(ours.input_ids, ours.attention_mask)
        outcome = model.model.fuse(image, text, "all")
    torch.testing.assert_close(outcome.pooled, fused.pooler_output, atol=1e-4, rtol=0)
    torch.testing.assert_close(outcome.text, fused.text_features, atol=1e-4, rtol=0)
