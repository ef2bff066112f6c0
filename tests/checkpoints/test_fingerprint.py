"""A fingerprint stays where vectors stay, and changes with all that they depend on."""

from dataclasses import make_dataclass, replace
from pathlib import Path

import pytest
import torch

from bridgetower.checkpoints import Checkpoint, fingerprint, read_checkpoint
from bridgetower.checkpoints.fingerprint import _changed, exact_fingerprint
from bridgetower.predictor import load
from bridgetower.processor import Processor, train_tokenizer


@pytest.fixture
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return read_checkpoint(tiny_checkpoint)


def of(checkpoint: Checkpoint) -> str:
    assert checkpoint.processor is not None
    return fingerprint(checkpoint.config, checkpoint.tensors, checkpoint.processor)


def test_is_the_same_in_either_precision_and_order(checkpoint: Checkpoint, tiny_checkpoint: Path) -> None:
    assert len(of(checkpoint)) == 16
    assert of(replace(checkpoint, tensors=dict(reversed(checkpoint.tensors.items())))) == of(checkpoint)
    assert load(tiny_checkpoint, device="cpu").fingerprint == of(checkpoint)
    assert load(tiny_checkpoint, device="cpu", precision="bf16").fingerprint == of(checkpoint)


@pytest.mark.parametrize("name", ["token_type_embedding.weight", "itc_head.image.weight", "vision.class_embedding"])
def test_changes_with_every_weight(checkpoint: Checkpoint, name: str) -> None:
    changed = checkpoint.tensors[name].clone()
    changed.view(-1)[-1] += 0.1
    assert of(replace(checkpoint, tensors=checkpoint.tensors | {name: changed})) != of(checkpoint)
    turned = checkpoint.tensors | {name: checkpoint.tensors[name].reshape(-1, 1)}  # same bytes, another shape
    assert of(replace(checkpoint, tensors=turned)) != of(checkpoint)


def test_changes_with_settings(checkpoint: Checkpoint) -> None:
    processor = checkpoint.processor
    assert processor is not None
    white = Processor(replace(processor.config, background=(255, 255, 255)), processor.tokenizer)
    words = Processor(processor.config, train_tokenizer(["another text"] * 9, vocab_size=300))
    variants = [
        replace(checkpoint, processor=white),
        replace(checkpoint, processor=words),
        replace(checkpoint, config=checkpoint.config.override({"vision.layer_norm_eps": 1e-6})),
        checkpoint.resized(40),
    ]
    found = {of(variant) for variant in [checkpoint, *variants]}
    assert len(found) == 1 + len(variants)


def test_a_new_setting_at_its_default_changes_nothing() -> None:
    before = make_dataclass("Before", [("a", int, 1)])
    after = make_dataclass("After", [("a", int, 1), ("b", torch.dtype, torch.float32)])
    assert dict(_changed(before(2))) == dict(_changed(after(2))) == {"a": 2}
    assert dict(_changed(after(2, torch.float16))) != {"a": 2}


def test_an_exact_one_changes_with_the_smallest_change(checkpoint: Checkpoint) -> None:
    tensors = dict(checkpoint.tensors)
    before, name = exact_fingerprint(tensors), "vision.class_embedding"
    assert exact_fingerprint(dict(reversed(tensors.items()))) == before
    assert len(before) == 16
    tensors[name] = torch.nextafter(tensors[name], torch.tensor(9.0))
    assert exact_fingerprint(tensors) != before
    assert of(replace(checkpoint, tensors=tensors)) == of(checkpoint)  # which counts in bfloat16
