"""Exports for checkpoints that were not exported: made once per content, anew when the content changes."""

import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import own_modules
import tiny
from bridgetower import Extensions
from bridgetower.checkpoints import Checkpoint, Reranking, read_checkpoint
from bridgetower.engines.folder import check_exported
from bridgetower.engines.onnx_graphs import products_overflow
from bridgetower.engines.start import cached_export, content_key
from bridgetower.extras import load_object
from bridgetower.model.bridgetower import BridgeTower


@pytest.fixture
def checkpoint(few_parts: Path) -> Checkpoint:
    return read_checkpoint(few_parts)


def test_exports_once_in_float32_and_says_so(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    half = {name: tensor.half() for name, tensor in checkpoint.tensors.items()}
    checkpoint = replace(checkpoint, tensors=half, reranking=Reranking(itc_weight=16.0))
    damaged = tmp_path / f"{content_key(checkpoint)}-onnx-int8{'-unsigned' * products_overflow()}"
    own, of_another = tmp_path / f".{damaged.name}.partial-killed", tmp_path / ".converted.partial-live"
    for left in (damaged, own, of_another):
        left.mkdir()
    (damaged / "text.onnx").touch()
    with caplog.at_level(logging.INFO, logger="bridgetower"):
        folder, model = cached_export(checkpoint, tmp_path, "onnx-int8")
        assert cached_export(checkpoint, tmp_path, "onnx-int8")[0] == folder == damaged
    warning, line = [record.getMessage() for record in caplog.records if record.name.startswith("bridgetower")]
    assert f"{folder} is damaged (no file {folder / 'export.json'}" in warning
    assert f"exporting it for this engine, once, to {folder}" in line
    check_exported(folder)
    assert not own.exists()
    assert of_another.exists()
    exported = read_checkpoint(folder)
    assert {tensor.dtype for tensor in exported.tensors.values()} == {torch.float32}
    assert model.state_dict().keys() == exported.tensors.keys()
    assert exported.reranking.itc_weight == 16


class TestKey:
    def test_does_not_depend_on_the_source(self, checkpoint: Checkpoint) -> None:
        same = replace(checkpoint, source="elsewhere", tensors={n: t.clone() for n, t in checkpoint.tensors.items()})
        assert content_key(same) == content_key(checkpoint)

    def test_depends_on_every_weight_and_the_config(self, checkpoint: Checkpoint) -> None:
        for name in ("vision.class_embedding", "itm_head.fc.bias"):
            changed = checkpoint.tensors[name].clone()
            changed[0] += 1e-6
            other = replace(checkpoint, tensors=checkpoint.tensors | {name: changed})
            assert content_key(other) != content_key(checkpoint)
        config = checkpoint.config.override({"vision.layer_norm_eps": 1e-6})
        assert content_key(replace(checkpoint, config=config)) != content_key(checkpoint)
        assert content_key(checkpoint.resized(40)) != content_key(checkpoint)

    def test_depends_on_the_code_that_own_parts_inherit(self, tmp_path: Path) -> None:
        file = tmp_path / "own_base.py"
        file.write_text(Path(own_modules.__file__).read_text())

        patches = load_object("extensions", f"{file}:Patches", type)

        class Tower(patches):  # type: ignore[misc]
            pass

        config, own = tiny.changed(vision__architecture="patches"), Extensions(vision_towers={"patches": Tower})
        tensors = BridgeTower(config, own).state_dict()
        checkpoint = Checkpoint(source="mine", config=config, tensors=tensors, extensions=own)
        key = content_key(checkpoint)
        assert content_key(checkpoint) == key
        assert content_key(replace(checkpoint, extensions=Extensions(vision_towers={"patches": patches}))) != key
        file.write_text(file.read_text().replace("torch.tanh", "torch.sin"))
        assert content_key(checkpoint) != key

    @pytest.mark.parametrize("package", ["bridgetower", "torch"])
    def test_depends_on_versions(self, checkpoint: Checkpoint, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
        key = content_key(checkpoint)
        monkeypatch.setattr(sys.modules[package], "__version__", "99.0")
        assert content_key(checkpoint) != key
