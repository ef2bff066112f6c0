"""Official checkpoints converted for transformers: its numbers with its eps, and reasons where it cannot hold them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface as hf
import pytest
import torch

import official
import tiny
from bridgetower.checkpoints import Checkpoint, Reranking, convert, read_checkpoint
from bridgetower.model.config import HeadsConfig

# transformers has one eps (1e-5) where the official code has 1e-12 inside the fusion layers and the MLM head.
SAME_EPS = {"fusion.layer_norm_eps": 1e-5, "heads.mlm_layer_norm_eps": 1e-5}
ONE_HEAD = {
    "mlm": {"heads.itm": False},
    "itm": {"heads.mlm": False},
    "backbone": {"heads.mlm": False, "heads.itm": False},
}


def converted(folder: Path, kind: str, changes: dict[str, Any] | None = None) -> tuple[Checkpoint, Path]:
    file = official.make(ONE_HEAD[kind] | (changes or {})).save(folder / "model.ckpt")
    checkpoint = read_checkpoint(file, overrides=official.OVERRIDES)
    convert(checkpoint, folder / "hf", "hf")
    return checkpoint, folder / "hf"


def with_same_eps(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, config=checkpoint.config.override(SAME_EPS))


def made(changes: dict[str, Any]) -> Checkpoint:
    """A checkpoint of random weights with the official settings but these."""
    config = official.CONFIG.override(changes)
    return Checkpoint(source="mine", config=config, tensors=tiny.build(config).state_dict())


@torch.no_grad()
def difference(checkpoint: Checkpoint, folder: Path, kind: str) -> float:
    theirs = hf.reload(folder, kind)
    batch = hf.inputs(theirs)
    ours, expected = hf.our_outputs(checkpoint.model(), batch), hf.their_outputs(theirs, batch)
    return max(tiny.off(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ONE_HEAD)
def test_eps_is_the_only_difference(tmp_path: Path, kind: str) -> None:
    checkpoint, folder = converted(tmp_path, kind)
    assert difference(checkpoint, folder, kind) < 2e-4
    assert difference(with_same_eps(checkpoint), folder, kind) < 1e-5
    tensors = dict(checkpoint.tensors)  # control: inputs of the LayerNorms of small variance make it visible
    for name in tensors:
        norm = name.endswith(("_bridges.0.norm.weight", "_bridges.0.norm.bias"))
        if name.startswith("fusion.") and (norm or ("_layers.1." in name and "out" in name)):
            tensors[name] = tensors[name] * 1e-2
    small = replace(checkpoint, tensors=tensors)
    convert(small, tmp_path / "small", "hf")
    assert difference(small, tmp_path / "small", kind) > 1e-4
    assert difference(with_same_eps(small), tmp_path / "small", kind) < 1e-5
    theirs = hf.reload(folder, kind).state_dict()
    pooler = {name: value for name, value in theirs.items() if "text_model.pooler" in name}
    assert len(pooler) == len(checkpoint.extra_tensors) == 2
    for name, value in pooler.items():
        assert torch.equal(value, checkpoint.extra_tensors["text." + name.partition("text_model.")[2]])


def test_one_folder_serves_both_heads(tmp_path: Path) -> None:
    """As in the published `itm-mlm` folders: each model of transformers leaves the other's head."""
    checkpoint = read_checkpoint(official.make().save(tmp_path / "model.ckpt"), overrides=official.OVERRIDES)
    convert(checkpoint, tmp_path / "hf", "hf")
    for kind, other in (("mlm", "itm_score"), ("itm", "mlm_score")):
        _, info = hf.KINDS[kind].from_pretrained(tmp_path / "hf", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
        assert {name.split(".")[0] for name in info["unexpected_keys"]} == {other}


def test_same_numbers_after_a_detour_through_transformers(tmp_path: Path) -> None:
    checkpoint, folder = converted(tmp_path, "itm")
    back = read_checkpoint(folder)
    assert tiny.equal(back.tensors, checkpoint.tensors)
    assert back.config == checkpoint.config.override(
        SAME_EPS | {"fusion.vision_layers": (2, 3), "fusion.text_layers": (2, 3)}
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (official.METER, "no bridges"),
        (official.BERT, "text tower is BERT"),
        ({"fusion.num_token_types": 3}, "token types"),
        (official.TIMM, "image tower is not CLIP"),
        *(
            ({f"fusion.{name}": value}, "fusion width, heads or feed-forward differ")
            for name, value in (("hidden_size", 24), ("num_heads", 4), ("intermediate_size", 64))
        ),
        ({"heads.itc": "tower"}, "contrastive head is the official kind"),
        ({"heads.itc": "fused"}, "image tower as wide as the fusion encoder"),
        ({"vision.num_heads": 4}, "image heads are not as many as fit"),
        ({"vision.intermediate_size": 256}, "image feed-forward"),
        ({"fusion.vision_layers": (1, 3)}, "same top layers"),
        ({"vision.num_layers": 4}, "same top layers"),
        (official.BERT | official.METER | {"fusion.num_token_types": 3}, "bridges.*BERT.*token types"),
    ],
)
def test_what_transformers_cannot_hold(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"transformers cannot hold mine: .*{reason}"):
        convert(made(changes), tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()


def test_lost_settings_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"fusion.dropout": 0.2, "fusion.layer_norm_eps": 1e-12, "heads.mlm_layer_norm_eps": 1e-6}
    lost = replace(made(changes), reranking=Reranking(itc_weight=16.0))
    expected = [
        "record of reranking: {'itc_weight': 16.0} becomes {'itc_weight': 0.0}",
        "layer norm eps of the fusion layers: 1e-12 becomes 1e-05",
        "dropout of the fusion layers: 0.2 becomes 0.1",
        "layer norm eps of the MLM head: 1e-06 becomes 1e-05",
    ]
    for checkpoint, warned in ((lost, expected), (made({"fusion.dropout": 0.1} | SAME_EPS), [])):
        caplog.clear()
        convert(checkpoint, tmp_path / str(len(warned)), "hf")
        messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert messages == [f"mine: transformers has no field for the {message}" for message in warned]


@pytest.mark.parametrize("to", ["hf", "bridgetower"])
def test_contrastive_head_can_be_left_out(tmp_path: Path, to: Any, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = made({"heads.itc": "tower"})
    caplog.set_level("INFO")
    convert(checkpoint, tmp_path / "out", to, drop_itc=True)
    assert "mine: the contrastive head is left out" in caplog.text
    back = read_checkpoint(tmp_path / "out")
    assert back.config.heads.itc is None
    kept = {name: value for name, value in checkpoint.tensors.items() if not name.startswith("itc_head.")}
    assert 0 < len(kept) < len(checkpoint.tensors)
    assert tiny.equal(back.tensors, kept)
    with pytest.raises(ValueError, match="has no contrastive head to drop"):
        convert(back, tmp_path / "again", to, drop_itc=True)


def test_contrastive_head_with_equal_widths_is_held(tmp_path: Path) -> None:
    """Control for the reason above: with equal widths the contrastive model of transformers runs."""
    changes = {"vision.hidden_size": 64, "vision.num_heads": 1, "vision.intermediate_size": 256}
    same_width = {f"{part}.hidden_size": 64 for part in ("text", "fusion")}
    heads = {f"{part}.num_heads": 4 for part in ("text", "fusion")}
    config = official.CONFIG.override(changes | same_width | heads | SAME_EPS)
    config = replace(config, heads=HeadsConfig(mlm=False, itm=False, itc="fused", itc_size=20))
    checkpoint = Checkpoint(source="mine", config=config, tensors=tiny.build(config).state_dict())
    convert(checkpoint, tmp_path / "hf", "hf")
    assert difference(checkpoint, tmp_path / "hf", "itc") < 1e-5
