"""From a checkpoint to what runs it."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bridgetower.checkpoints import Checkpoint
from bridgetower.checkpoints.fingerprint import code_content
from bridgetower.engines.config import FASTEST, FORMS, EngineName, EngineRequest, Form, Precision
from bridgetower.engines.engine import Engine, TorchEngine
from bridgetower.engines.folder import VERSION, exported_model, is_exported, write_exported
from bridgetower.engines.onnx_graphs import products_overflow
from bridgetower.engines.parts import part_names
from bridgetower.engines.parts_engine import PartsEngine
from bridgetower.engines.runners import make_runner
from bridgetower.extras import is_installed, require
from bridgetower.files import cache_folder, locked, remove_folder, remove_leftovers
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.plain import check_choice

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """How a model is to be run.

    Attributes:
        engine: What computes: `torch`, or `onnxruntime` and `openvino` with exported parts.
        precision: What it computes in. The numbers of `int8` depend on what else is in the batch.
        device: Of engine `torch`, such as `cpu` or `cuda:0`; None takes a GPU if there is one.
        cache: Folder where checkpoints that were not exported are exported to when another engine first needs it.
        compile: Whether engine `torch` has `torch.compile` make kernels, which takes minutes and a C++ compiler.
    """

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
        """What the weights are to be read in."""
        if self.form is not None:
            return torch.float32
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision, torch.float32)

    @property
    def form(self) -> Form | None:
        """Of the parts that are run; None if the model itself is."""
        return FORMS[self.engine, self.precision]

    def start(self, checkpoint: Checkpoint, folder: Path | None = None) -> Engine:
        """Returns the engine of a checkpoint."""
        if self.form is None:
            return TorchEngine(
                checkpoint.model(copy=False),
                find_device(self.device),
                self.dtype,
                compiler="inductor" if self.compile else None,
            )
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
    """Returns a device by its name; None takes a GPU if there is one."""
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


def cached_export(
    checkpoint: Checkpoint, cache: Path, form: Form, *, progress: bool = False
) -> tuple[Path, BridgeTower]:
    """Returns the folder in `cache` with the parts of a checkpoint and its model; exports it if need be."""
    unsigned = form == "onnx-int8" and products_overflow()  # processors with and without VNNI may share a cache
    folder = cache / f"{content_key(checkpoint)}-{form}{'-unsigned' * unsigned}"
    with locked(cache, wait=True):
        if folder.exists():
            try:
                return folder, exported_model(folder, checkpoint.extensions)
            except (FileNotFoundError, ValueError) as error:
                logger.warning("%s is damaged (%s); it is removed and exported again", folder, error)
                remove_folder(folder)
        remove_leftovers(cache, folder.name)  # others in the cache may belong to live processes
        logger.info("%s: exporting it for this engine, once, to %s", checkpoint.source, folder)
        write_exported(checkpoint, folder, form, progress=progress)
        return folder, exported_model(folder, checkpoint.extensions)


def content_key(checkpoint: Checkpoint) -> str:
    """Returns a name that two checkpoints share if their config, their weights and all code of their parts are equal.

    That is the code of the model's classes, custom ones included, of `bridgetower.model` and of the export, with the
    versions of the packages that the classes are from.
    """
    model, own = checkpoint.model(copy=False), checkpoint.extensions
    builders = {*own.vision_towers.values(), *own.text_towers.values(), *own.bridges.values()}
    code = code_content(
        {*map(type, model.modules()), *filter(inspect.isfunction, builders)},
        [file for place in (inspect.getfile(BridgeTower), __file__) for file in Path(place).parent.glob("*.py")],
    )
    content = [VERSION, checkpoint.config.to_dict(), part_names(model), code]
    digest = hashlib.sha256(json.dumps(content).encode())
    for name in sorted(checkpoint.tensors):
        digest.update(name.encode())
        digest.update(checkpoint.tensors[name].float().contiguous().numpy().data)
    return digest.hexdigest()[:32]
