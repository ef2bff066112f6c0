"""What computes for a predictor: the model itself on any device, or exported parts on the CPU.

Both have the methods of `BridgeTower`, but take float32 pixels, and inputs on any device, whatever they compute in and
on. Several threads may call them at once. Heads run in `model`, on what an engine hands out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridgetower.checkpoints import Checkpoint
from bridgetower.engines.config import FASTEST, FORMS, EngineName, EngineRequest, Form, Precision
from bridgetower.engines.export import cached_export, exported_model, is_exported
from bridgetower.engines.parts import PartsEngine, Runner
from bridgetower.extras import is_installed, require
from bridgetower.files import cache_folder
from bridgetower.model.bridgetower import IMAGE, BridgeTower, EncodeOutputs
from bridgetower.model.cpu import pack_weights
from bridgetower.model.fusion import Encoded, Fused, FusionOutputs, Mask
from bridgetower.model.layers import compiler_options, to_device

_STARTING = Lock()
_PARTS = {"encode_image": "vision", "encode_text": "text", "fuse": "fusion"}


class TorchEngine:
    """The model itself, in evaluation mode and in the number format that it computes in.

    On a CPU, its kernels are swapped in and the weights of each part packed when it is first used: loading takes no
    second copy, and embedding texts none of the rest. A compiled model has few graphs, as inputs come in one form.
    """

    def __init__(
        self,
        model: BridgeTower,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        compiler: str | None = None,
    ) -> None:
        self.model = model.to(device, dtype)
        self.device, self._dtype, self._compiler = device, dtype, compiler
        self._compiled: dict[str, Callable[..., Any]] | None = None
        self._unpacked: dict[str, str] = {}  # parts, by the method that they are for

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_compiled": None}

    def _started(self, method: str) -> Callable[..., Any]:
        """Returns what computes; several threads may make the first call at once."""
        with _STARTING:
            if self._compiled is None:
                self._compiled = {}
                if self._compiler is None:
                    self._unpacked = dict(_PARTS)
                    pack_weights(
                        self.model, left=[getattr(self.model, part) for part in _PARTS.values()]
                    )
                else:
                    compiled = partial(
                        torch.compile, dynamic=True, **compiler_options(self._compiler)
                    )
                    self._compiled = {name: compiled(getattr(self.model, name)) for name in _PARTS}
            if self._compiler is None and (part := self._unpacked.pop(method, None)):
                pack_weights(getattr(self.model, part))
        return self._compiled.get(method) or getattr(self.model, method)

    def encode_image(
        self,
        pixel_values: Float[Tensor, "b 3 h w"],
        token_type: int = IMAGE,
        *,
        outputs: EncodeOutputs = "layers",
    ) -> Encoded:
        pixel_values = to_device(pixel_values, self.device).to(self._dtype)
        return self._started("encode_image")(pixel_values, token_type, outputs=outputs)

    def encode_text(
        self,
        input_ids: Int[Tensor, "b l"],
        attention_mask: Mask = None,
        *,
        outputs: EncodeOutputs = "layers",
    ) -> Encoded:
        input_ids = to_device(input_ids, self.device)
        mask = None if attention_mask is None else to_device(attention_mask, self.device)
        if self._compiler is not None:
            mask = torch.ones_like(input_ids) if mask is None else mask.long()
        return self._started("encode_text")(input_ids, mask, outputs=outputs)

    def cache_image(self, image: Encoded) -> Encoded:
        self._started("fuse")  # part of which it computes
        return self.model.cache_image(image)

    def cache_text(self, text: Encoded) -> Encoded:
        self._started("fuse")
        return self.model.cache_text(text)

    def fuse(self, image: Encoded, text: Encoded, outputs: FusionOutputs = "pooled") -> Fused:
        if self._compiler is not None and image.layers and text.layers:
            # Rows are copied, and the CLS, of which only the size is read, is always a view.
            image, text = (
                Encoded(
                    layers := tuple(each.layers), layers[0][:, 0], each.mask, each.first_layer_cache
                )
                for each in (image, text)
            )
        return self._started("fuse")(image, text, outputs)


Engine = TorchEngine | PartsEngine


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """How a model is to be run; see `load`."""

    engine: EngineName = "torch"
    precision: Precision = "fp32"
    device: str | int | torch.device | None = None
    cache: Path = field(default_factory=cache_folder)
    compile: bool = False

    def __post_init__(self) -> None:
        if (self.engine, self.precision) not in FORMS:
            able = [engine for engine, precision in FORMS if precision == self.precision]
            raise ValueError(
                f"engine {self.engine} has no {self.precision}; engines that have it: {', '.join(able)}"
            )
        if self.engine != "torch" and self.compile:
            raise ValueError(
                f"engine {self.engine} is not compiled; use engine torch with compile=True"
            )
        if self.engine != "torch" and self.device not in (None, "auto", "cpu", torch.device("cpu")):
            raise ValueError(
                f"engine {self.engine} runs on the CPU, not on {self.device}; use engine torch there"
            )
        if find_device(self.device).type == "cpu" and self.precision == "fp16":
            raise ValueError(
                "precision fp16 is for GPUs; on the CPU use bf16, which takes as little memory, or fp32"
            )
        if self.engine != "torch":
            require("openvino" if self.engine == "openvino" else "onnx", self.engine)

    @property
    def form(self) -> Form | None:
        return FORMS[self.engine, self.precision]

    @property
    def dtype(self) -> torch.dtype:
        formats = {"bf16": torch.bfloat16, "fp16": torch.float16} if self.form is None else {}
        return formats.get(self.precision, torch.float32)

    def start(self, checkpoint: Checkpoint, folder: Path | None = None) -> Engine:
        if self.form is None:
            model, compiler = (
                checkpoint.model(copy=False).requires_grad_(False),
                "inductor" if self.compile else None,
            )
            return TorchEngine(model, find_device(self.device), self.dtype, compiler)
        if folder is not None and is_exported(folder, self.engine, self.form):
            model = exported_model(folder, checkpoint.extensions)
        else:
            folder, model = cached_export(
                checkpoint, self.cache, self.form, progress=sys.stderr.isatty()
            )
        return PartsEngine(model, Runner(self.engine, folder, self.precision))


def chosen_engine(
    engine: EngineRequest, precision: Precision, device: str | int | torch.device | None
) -> EngineName:
    """Returns the engine that is asked for; for `auto`, torch on a GPU, on a CPU the fastest that is installed."""
    if engine != "auto":
        return engine
    able = FASTEST.get(precision, ("torch",))
    if "torch" in able and find_device(device).type != "cpu":
        return "torch"
    exporting = is_installed("onnxscript")  # other engines export what was not exported
    return next(
        (name for name in able if name == "torch" or (exporting and is_installed(name))), able[0]
    )


def find_device(name: str | int | torch.device | None) -> torch.device:
    available = torch.cuda.is_available()
    if name in (None, "auto"):
        return torch.device("cuda" if available else "cpu")
    if isinstance(name, int) or str(name).isdecimal():
        name = f"cuda:{name}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; expected a name such as cpu or cuda:0") from error
    if device.type == "cuda" and (
        not available or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise ValueError(
            f"device is {name!r}, but PyTorch sees {torch.cuda.device_count()} GPUs; use another or cpu"
        )
    found = torch.accelerator.current_accelerator(check_available=True)
    if device.type not in ("cpu", "cuda", found and found.type):
        raise ValueError(
            f"device is {name!r}, on which PyTorch cannot compute here; use cpu or cuda:0"
        )
    return device
