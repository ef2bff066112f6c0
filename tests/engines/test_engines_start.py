"""What can be chosen, and what is said about the rest."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bridgetower.checkpoints import read_checkpoint
from bridgetower.engines import EngineChoice, TorchEngine, packages
from bridgetower.engines.parts_engine import PartsEngine


class TestChoice:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"engine": "tensorrt"}, "engine is 'tensorrt'; expected one of torch, onnxruntime"),
            ({"precision": "fp16"}, "precision is 'fp16'; expected one of fp32, bf16"),
            ({"engine": "onnxruntime", "precision": "bf16"}, "engine onnxruntime has no bf16; .*: torch"),
            ({"engine": "onnxruntime", "device": "cuda:0"}, "engine onnxruntime runs on the CPU, not on cuda:0"),
            ({"device": "gpu"}, "device is 'gpu'; expected a name such as cpu or cuda:0"),
            ({"device": "cuda:99"}, "device is 'cuda:99', but PyTorch sees"),
        ],
    )
    def test_that_does_not_exist(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            EngineChoice(**options)

    def test_of_a_number_format(self) -> None:
        assert EngineChoice(precision="bf16").dtype == torch.bfloat16
        assert EngineChoice().dtype == EngineChoice(engine="onnxruntime").dtype == torch.float32


class TestStart:
    def test_torch(self, tiny_checkpoint: Path) -> None:
        engine = EngineChoice(device="cpu", precision="bf16").start(read_checkpoint(tiny_checkpoint))
        assert isinstance(engine, TorchEngine)
        assert engine.model.token_type_embedding.weight.dtype == torch.bfloat16

    def test_an_exported_folder_is_not_exported_again(self, exported: Path, tmp_path: Path) -> None:
        choice = EngineChoice(engine="onnxruntime", cache=tmp_path)
        assert isinstance(choice.start(read_checkpoint(exported), exported), PartsEngine)
        assert list(tmp_path.iterdir()) == []

    def test_a_missing_package(self, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(packages, "is_installed", lambda name: name != "onnxruntime")
        message = r"package onnxruntime is not installed; run: pip install 'bridgetower\[onnx\]'"
        with pytest.raises(FileNotFoundError, match=message):
            EngineChoice(engine="onnxruntime").start(read_checkpoint(exported), exported)
