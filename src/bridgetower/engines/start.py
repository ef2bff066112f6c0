"""From a checkpoint to what runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from bridgetower.checkpoints import Checkpoint, read_checkpoint
from bridgetower.engines.cache import cached_export
from bridgetower.engines.engine import Engine, TorchEngine
from bridgetower.engines.folder import check_exported
from bridgetower.engines.onnxruntime_runner import OnnxRuntimeRunner
from bridgetower.engines.packages import require
from bridgetower.engines.parts_engine import PartsEngine

EngineName = Literal["torch", "onnxruntime"]
Precision = Literal["fp32", "bf16"]

ENGINES: dict[EngineName, tuple[Precision, ...]] = {"torch": ("fp32", "bf16"), "onnxruntime": ("fp32",)}
CACHE = Path.home() / ".cache" / "bridgetower"


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """How a model is to be run.

    Attributes:
        engine: What computes: `torch`, or `onnxruntime` with exported parts.
        precision: What it computes in.
        device: Of engine `torch`, such as `cpu` or `cuda:0`; None takes a GPU if there is one.
        cache: Folder where checkpoints that were not exported are exported to when another engine first needs it.
    """

    engine: EngineName = "torch"
    precision: Precision = "fp32"
    device: str | torch.device | None = None
    cache: Path = CACHE

    def __post_init__(self) -> None:
        """Checks that there is such an engine, in this precision, on this device."""
        if self.engine not in ENGINES:
            raise ValueError(f"engine is {self.engine!r}; expected one of {', '.join(ENGINES)}")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision is {self.precision!r}; expected one of {', '.join(get_args(Precision))}")
        if self.precision not in ENGINES[self.engine]:
            able = [name for name, precisions in ENGINES.items() if self.precision in precisions]
            raise ValueError(f"engine {self.engine} has no {self.precision}; engines that have it: {', '.join(able)}")
        if self.engine != "torch" and self.device not in (None, "cpu", torch.device("cpu")):
            raise ValueError(f"engine {self.engine} runs on the CPU, not on {self.device}; use engine torch there")
        find_device(self.device)

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are to be read in."""
        return torch.bfloat16 if self.engine == "torch" and self.precision == "bf16" else torch.float32

    def start(self, checkpoint: Checkpoint, folder: Path | None = None) -> Engine:
        """Returns the engine of a checkpoint.

        Args:
            checkpoint: With weights in `dtype`.
            folder: Where it was read from, if that holds its exported parts.

        Raises:
            FileNotFoundError: A package or a part is missing.
            ValueError: A part is damaged, or an export for the cache differs from the model.
        """
        if self.engine == "torch":
            return TorchEngine(checkpoint.model(), find_device(self.device), self.dtype)
        require("onnxruntime", extra="onnx")
        folder = folder or cached_export(checkpoint, self.cache)
        check_exported(folder)
        return PartsEngine(read_checkpoint(folder).model(), OnnxRuntimeRunner(folder))


def find_device(name: str | torch.device | None) -> torch.device:
    """Returns a device by its name; None takes a GPU if there is one.

    Raises:
        ValueError: There is no such device.
    """
    available = torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; expected a name such as cpu or cuda:0") from error
    if device.type == "cuda" and (not available or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device is {name!r}, but PyTorch sees {torch.cuda.device_count()} GPUs; use another or cpu")
    return device
