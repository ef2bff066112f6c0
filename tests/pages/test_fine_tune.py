"""Every command of docs/fine-tune.md, in its order, with a small random model of transformers for the published one."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from shell_commands import commands

from bridgetower.checkpoints import read_checkpoint
from bridgetower.inference.predictor import load
from bridgetower.processor import Processor, ProcessorConfig
from helpers.models import off_defaults
from helpers.shapes import write_shape_pictures

PAGE = Path(__file__).parents[2] / "docs" / "fine-tune.md"
PUBLISHED = "BridgeTower/bridgetower-large-itm-mlm-itc"
SMALL = (
    "--batch-size 18 --micro-batch-size 9 --image-size 32 --optimizer.lr 1e-3 --data.num-workers 0 --precision fp32 "
    "--max-epochs"
)


def write_published(folder, tokens):
    transformers = pytest.importorskip("transformers")
    processor = read_checkpoint(tokens).processor
    assert processor is not None
    width = {"hidden_size": 64, "num_hidden_layers": 3}
    text = {"num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 40}
    config = transformers.BridgeTowerConfig(
        **{
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "contrastive_hidden_size": 32,
            "logit_scale_init_value": 2.6592,
        },
        text_config={**width, **text, "vocab_size": processor.vocab_size},
        vision_config={**width, "image_size": 32, "patch_size": 16},
    )
    off_defaults(transformers.BridgeTowerForContrastiveLearning(config)).save_pretrained(folder)
    values = ProcessorConfig(profile="hf", image_size=32, max_length=38, patch_size=16)
    Processor(values, processor.tokenizer).save_huggingface(folder)


@pytest.fixture
def fine_tune_folder(tmp_path, tiny_checkpoint, monkeypatch):
    (tmp_path / "photos").mkdir()
    heading, *rows = write_shape_pictures(tmp_path / "photos").read_text().splitlines()
    (tmp_path / "captions.csv").write_text("\n".join([heading, *(f"photos/{row}" for row in rows)]))
    write_published(tmp_path / "published", tiny_checkpoint)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def losses(model):
    """What is hard to find in the first captions of all photos, by who looks for what."""
    captions = {}
    for row in Path("captions.csv").read_text().splitlines()[1:]:
        captions.setdefault(*row.split(",", 1))
    predictor = load(model, device="cpu")
    images = list(map(Path, captions))
    texts = list(captions.values())
    embeds = {"image": predictor.embed_images(images), "text": predictor.embed_texts(texts)}
    embeds["pair"] = predictor.embed_pairs(images, texts)
    targets = torch.arange(len(texts))
    return {
        f"{source} to {other}": F.cross_entropy(
            14 * embeds[source] @ embeds[other].T, targets
        ).item()
        for source, other in (("text", "image"), ("text", "pair"), ("image", "pair"))
    }


def test_every_command(run, fine_tune_folder, caplog):
    hits = {}
    for command in commands(PAGE):
        epochs = "12" if command[-1] == "runs/my-photos" else "1"
        small = [*SMALL.split(), epochs] if command[0] == "train" else []
        printed = run(*[argument.replace(PUBLISHED, "published") for argument in command], *small)
        if command[0] == "search":
            hits[" ".join(command[3:])] = printed
        assert "contrastive" not in "".join(
            r.message for r in caplog.records if r.levelname == "WARNING"
        )
    assert hits.keys() == {"", "--against pairs"}
    assert all(hit["cosine"] is not None for rows in hits.values() for hit in rows)

    before = losses("published")
    after = losses("runs/my-photos")
    assert all(after[name] < before[name] - 0.5 for name in before), (before, after)
    assert (
        json.loads(Path("runs/my-photos-matching/last/config.json").read_text())["model"]["heads"][
            "itc"
        ]
        == "fused"
    )
    assert losses("my-photos-hf") == pytest.approx(after, abs=1e-4)
