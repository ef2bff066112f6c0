"""Exported folders: whole checkpoints that load, and are refused when something in them was changed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridgetower.checkpoints import read_checkpoint, update_weights
from bridgetower.engines import folder
from bridgetower.engines.folder import MANIFEST, check_exported, is_exported, write_exported
from bridgetower.engines.runners import OnnxRuntimeRunner
from tiny import equal


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


class TestWriting:
    def test_is_a_checkpoint(self, exported: Path, tiny_checkpoint: Path) -> None:
        ours, source = read_checkpoint(exported), read_checkpoint(tiny_checkpoint)
        assert ours.config == source.config
        assert equal(ours.tensors, source.tensors)
        assert ours.processor is not None
        assert is_exported(exported, "onnx")
        assert not is_exported(exported, "onnx-int8")
        assert not is_exported(tiny_checkpoint, "onnx")
        check_exported(exported)

    def test_states_the_largest_differences(self, exported: Path) -> None:
        differences = json.loads((exported / MANIFEST).read_text())["largest_difference"]
        assert differences.keys() == {"onnxruntime", "openvino"}
        for parts in differences.values():
            assert len(parts) == 6
            assert all(0 <= difference < 2e-5 for difference in parts.values())

    def test_refuses_a_folder_in_use(self, exported: Path, tiny_checkpoint: Path) -> None:
        with pytest.raises(FileExistsError, match="is not empty; choose another name"):
            write_exported(read_checkpoint(tiny_checkpoint), exported)

    def test_leaves_nothing_where_an_engine_differs(
        self, few_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(folder.TOLERANCES, "onnx", 1e-12)
        with pytest.raises(
            ValueError, match=r"part image in onnxruntime differs from the model by .*; expected at most 1e-12"
        ):
            write_exported(read_checkpoint(few_parts), tmp_path / "model")
        assert list(tmp_path.iterdir()) == []


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _other_version(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 9}))


def _half(path: Path) -> None:
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)


class TestDamage:
    @pytest.mark.parametrize(
        ("name", "damage", "message"),
        [
            ("fusion_pooled.onnx", _cut, r"fusion_pooled.onnx is not what was exported; export the model again"),
            ("text.onnx", Path.unlink, "text.onnx is missing; export the model again"),
            ("export.json", _other_version, "was exported as version 9; this release reads 1"),
            ("export.json", _cut, "is not valid JSON"),
            ("model.safetensors", _half, "is not what its parts were exported of"),
        ],
    )
    def test_is_refused(self, copied: Path, name: str, damage: Callable[[Path], None], message: str) -> None:
        damage(copied / name)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            check_exported(copied)

    def test_other_weights_of_the_same_layout_are_run(self, copied: Path) -> None:
        checkpoint = read_checkpoint(copied)
        doubled = {name: 2 * tensor for name, tensor in checkpoint.tensors.items()}
        ids, mask = torch.tensor([[0, 5, 2]]), torch.ones(1, 3, dtype=torch.int64)
        update_weights(replace(checkpoint, tensors=doubled), copied)
        check_exported(copied)
        expected = read_checkpoint(copied).model().encode_text(ids, mask).cls
        output = OnnxRuntimeRunner(copied).run("text", [ids.numpy(), mask.numpy()])[-1]
        torch.testing.assert_close(torch.from_numpy(output), expected.detach(), atol=2e-5, rtol=0)
