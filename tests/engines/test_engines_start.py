"""What can be chosen, and what is said about the rest."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from bridgetower import extras
from bridgetower.checkpoints import read_checkpoint
from bridgetower.engines import engine
from bridgetower.engines.config import FASTEST, FORMS, EngineName, Precision
from bridgetower.engines.engine import EngineChoice, TorchEngine, chosen_engine
from bridgetower.engines.parts import PartsEngine


class TestChoice:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"engine": "tensorrt"}, "engine is 'tensorrt'; expected one of torch, onnxruntime, openvino"),
            ({"precision": "fp8"}, "precision is 'fp8'; expected one of fp32, bf16, fp16, int8"),
            ({"precision": "fp16", "device": "cpu"}, "precision fp16 is for GPUs; on the CPU use bf16"),
            ({"engine": "openvino", "precision": "fp16"}, "engine openvino has no fp16; .*: torch"),
            ({"engine": "onnxruntime", "precision": "bf16"}, "engine onnxruntime has no bf16; .*: torch, openvino"),
            ({"precision": "int8"}, "engine torch has no int8; engines that have it: onnxruntime"),
            ({"engine": "openvino", "precision": "int8"}, "engine openvino has no int8"),
            ({"engine": "onnxruntime", "device": "cuda:0"}, "engine onnxruntime runs on the CPU, not on cuda:0"),
            ({"device": "gpu"}, "device is 'gpu'; expected a name such as cpu or cuda:0"),
            ({"engine": "openvino", "compile": True}, "engine openvino is not compiled; use engine torch"),
            ({"device": "cuda:99"}, "device is 'cuda:99', but PyTorch sees"),
            ({"device": "meta"}, "device is 'meta', on which PyTorch cannot compute here"),
            ({"device": "vulkan"}, "device is 'vulkan', on which PyTorch cannot compute here"),
        ],
    )
    def test_that_does_not_exist(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            EngineChoice(**options)

    def test_of_a_number_format(self) -> None:
        assert EngineChoice(precision="bf16").dtype == torch.bfloat16
        assert EngineChoice().dtype == EngineChoice(engine="onnxruntime").dtype == torch.float32


class TestAuto:
    @pytest.mark.parametrize("precision", get_args(Precision))
    def test_takes_the_first_that_is_installed(self, monkeypatch: pytest.MonkeyPatch, precision: Precision) -> None:
        able = FASTEST[precision]
        assert {(engine, precision) for engine in able} <= FORMS.keys()
        assert chosen_engine("auto", precision, "cpu") == able[0]
        monkeypatch.setattr(engine, "is_installed", lambda package: package in ("onnxscript", able[-1]))
        assert chosen_engine("auto", precision, "cpu") == able[-1]

    def test_takes_none_that_could_not_export(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engine, "is_installed", lambda package: package != "onnxscript")
        assert chosen_engine("auto", "fp32", "cpu") == "torch"

    def test_takes_torch_on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engine, "find_device", lambda device: torch.device("cuda"))
        assert chosen_engine("auto", "fp32", None) == "torch"

    def test_leaves_other_engines_as_they_are(self) -> None:
        assert chosen_engine("onnxruntime", "fp32", None) == "onnxruntime"


class TestStart:
    def test_torch(self, tiny_checkpoint: Path) -> None:
        started = EngineChoice(device="cpu", precision="bf16").start(read_checkpoint(tiny_checkpoint))
        assert isinstance(started, TorchEngine)
        assert started.model.token_type_embedding.weight.dtype == torch.bfloat16

    def test_an_exported_folder_is_not_exported_again(self, exported: Path, tmp_path: Path) -> None:
        choice = EngineChoice(engine="onnxruntime", cache=tmp_path)
        assert isinstance(choice.start(read_checkpoint(exported), exported), PartsEngine)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(("name", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino")])
    def test_a_missing_package(
        self, exported: Path, monkeypatch: pytest.MonkeyPatch, name: EngineName, extra: str
    ) -> None:
        monkeypatch.setattr(extras, "is_installed", lambda package: package != name)
        message = rf"package {name} is not installed; run in the project's folder: pip install '\.\[{extra}\]'"
        with pytest.raises(FileNotFoundError, match=message):
            EngineChoice(engine=name).start(read_checkpoint(exported), exported)
