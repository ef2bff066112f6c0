"""From a checkpoint to what runs it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bridgetower.checkpoints import Checkpoint
from bridgetower.engines.config import FASTEST, FORMS, EngineName, EngineRequest, Form, Precision
from bridgetower.engines.engine import Engine, TorchEngine
from bridgetower.engines.export import cached_export, exported_model, is_exported
from bridgetower.engines.parts_engine import PartsEngine, make_runner
from bridgetower.extras import is_installed, require
from bridgetower.files import cache_folder
from bridgetower.model.plain import check_choice


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """How a model is to be run; see `load`."""

    engine: EngineName = "torch"
    precision: Precision = "fp32"
    device: str | torch.device | None = None
    cache: Path = field(default_factory=cache_folder)
    compile: bool = False

    def __post_init__(self) -> None:
        check_choice("engine", self.engine, EngineName)
        check_choice("precision", self.precision, Precision)
        if (self.engine, self.precision) not in FORMS:
            able = [engine for engine, precision in FORMS if precision == self.precision]
            raise ValueError(f"engine {self.engine} has no {self.precision}; engines that have it: {', '.join(able)}")
        if self.engine != "torch" and self.compile:
            raise ValueError(f"engine {self.engine} is not compiled; use engine torch with compile=True")
        if self.engine != "torch" and self.device not in (None, "cpu", torch.device("cpu")):
            raise ValueError(f"engine {self.engine} runs on the CPU, not on {self.device}; use engine torch there")
        if find_device(self.device).type == "cpu" and self.precision == "fp16":
            raise ValueError("precision fp16 is for GPUs; on the CPU use bf16, which takes as little memory, or fp32")

    @property
    def dtype(self) -> torch.dtype:
        if self.form is not None:
            return torch.float32
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision, torch.float32)

    @property
    def form(self) -> Form | None:
        return FORMS[self.engine, self.precision]

    def start(self, checkpoint: Checkpoint, folder: Path | None = None) -> Engine:
        if self.form is None:
            compiler = "inductor" if self.compile else None
            return TorchEngine(checkpoint.model(copy=False), find_device(self.device), self.dtype, compiler=compiler)
        require("openvino" if self.engine == "openvino" else "onnx", self.engine)
        if folder is not None and is_exported(folder, self.form):
            model = exported_model(folder, checkpoint.extensions)
        else:
            folder, model = cached_export(checkpoint, self.cache, self.form, progress=sys.stderr.isatty())
        return PartsEngine(model, make_runner(self.engine, folder, self.precision))


def chosen_engine(engine: EngineRequest, precision: Precision, device: str | torch.device | None) -> EngineName:
    """Returns the engine that is asked for; for `auto`, torch on a GPU, on a CPU the fastest that is installed."""
    if engine != "auto":
        return engine
    able = FASTEST.get(precision, ("torch",))
    if "torch" in able and find_device(device).type != "cpu":
        return "torch"
    exporting = is_installed("onnxscript")  # other engines export what was not exported
    return next((name for name in able if name == "torch" or (exporting and is_installed(name))), able[0])


def find_device(name: str | torch.device | None) -> torch.device:
    available = torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; expected a name such as cpu or cuda:0") from error
    if device.type == "cuda" and (not available or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device is {name!r}, but PyTorch sees {torch.cuda.device_count()} GPUs; use another or cpu")
    found = torch.accelerator.current_accelerator(check_available=True)
    if device.type not in ("cpu", "cuda", found and found.type):
        raise ValueError(f"device is {name!r}, on which PyTorch cannot compute here; use cpu or cuda:0")
    return device
