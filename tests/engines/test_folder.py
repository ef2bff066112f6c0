"""Exported folders: whole checkpoints that load, and are refused when something in them was changed."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import load_file, save_file

from bridgetower.checkpoints import read_checkpoint, update_weights
from bridgetower.engines import folder
from bridgetower.engines.folder import MANIFEST, check_exported, exported_model, is_exported, write_exported
from bridgetower.engines.onnx_graphs import products_overflow
from bridgetower.engines.runners import OnnxRuntimeRunner
from bridgetower.model import products
from bridgetower.model.extensions import NO_EXTENSIONS
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


def _flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def _other_version(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 9}))


def _half(path: Path) -> None:
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)


class TestSignedWeights:
    """int8 weights are signed where the processor has VNNI; elsewhere their products would overflow."""

    @pytest.fixture
    def processor(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        """Makes this one of x86 with some flags."""
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        monkeypatch.setattr(products, "_CPU_INFO", tmp_path / "cpuinfo")
        return lambda flags: (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu sse2 {flags}\n") and None

    @pytest.mark.parametrize(
        ("flags", "overflow"), [("avx2", True), ("avx2 avx_vnni", False), ("avx512f avx512_vnni", False)]
    )
    def test_which_processors_overflow(self, processor: Callable[[str], None], flags: str, overflow: bool) -> None:
        assert products_overflow()  # nothing is known of it yet
        processor(flags)
        assert products_overflow() == overflow

    @pytest.mark.parametrize(("flags", "kind"), [("avx2", TensorProto.UINT8), ("avx_vnni", TensorProto.INT8)])
    def test_weights_that_are_written(
        self, few_parts: Path, tmp_path: Path, processor: Callable[[str], None], flags: str, kind: int
    ) -> None:
        processor(flags)
        write_exported(read_checkpoint(few_parts), tmp_path / "model", "onnx-int8")
        check_exported(tmp_path / "model")
        tensors = onnx.load(tmp_path / "model" / "image.onnx").graph.initializer
        assert {tensor.data_type for tensor in tensors if tensor.name.endswith("_quantized")} == {kind}
        processor("avx2")
        with pytest.raises(ValueError, match="for processors with VNNI") if kind == TensorProto.INT8 else nullcontext():
            check_exported(tmp_path / "model")


class TestDamage:
    @pytest.mark.parametrize(
        ("name", "damage", "message"),
        [
            ("fusion_pooled.onnx", _cut, r"fusion_pooled.onnx is not what was exported; export the model again"),
            ("text.onnx", Path.unlink, "text.onnx is missing; export the model again"),
            ("export.json", _other_version, "was exported as version 9; this release reads 2"),
            ("export.json", _cut, "is not valid JSON"),
            ("model.safetensors", _half, "is not what its parts were exported of"),
            ("model.safetensors", _flip, "model.safetensors .*copy it again"),
            ("model.safetensors", Path.unlink, "model.safetensors"),
            ("config.json", Path.unlink, "has no config.json"),
        ],
    )
    def test_is_refused(self, copied: Path, name: str, damage: Callable[[Path], None], message: str) -> None:
        damage(copied / name)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            exported_model(copied, NO_EXTENSIONS)

    def test_other_weights_of_the_same_layout_are_run(self, copied: Path) -> None:
        checkpoint = read_checkpoint(copied)
        doubled = {name: 2 * tensor for name, tensor in checkpoint.tensors.items()}
        ids, mask = torch.tensor([[0, 5, 2]]), torch.ones(1, 3, dtype=torch.int64)
        update_weights(replace(checkpoint, tensors=doubled), copied)
        check_exported(copied)
        expected = read_checkpoint(copied).model().encode_text(ids, mask).cls
        output = OnnxRuntimeRunner(copied).run("text", [ids.numpy(), mask.numpy()])[-1]
        torch.testing.assert_close(torch.from_numpy(output), expected.detach(), atol=2e-5, rtol=0)
