"""Engines of a predictor, which run the model itself on any device, or its exported parts on the CPU.

Both have the methods of `BridgeTower`, but take float32 pixels and inputs on any device. Several threads may call them
at once. Heads run in `model`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from bridgetower.checkpoints import Checkpoint
from bridgetower.engines.config import (
    ENGINES,
    EngineName,
    EngineRequest,
    Form,
    Precision,
    engines_with,
)
from bridgetower.engines.export import cached_export, exported_model, is_exported
from bridgetower.engines.parts import PartsEngine, Runner
from bridgetower.extras import is_installed, require
from bridgetower.files import cache_folder
from bridgetower.model.bridgetower import IMAGE, BridgeTower, EncodeOutputs
from bridgetower.model.cpu import pack_weights
from bridgetower.model.fusion import Encoded, Fused, FusionOutputs, Mask
from bridgetower.model.layers import Pixels, TokenIds, compiler_options, to_device

_STARTING = Lock()
# The encoder that each method of an engine runs.
_ENCODERS = {"encode_image": "vision", "encode_text": "text", "fuse": "fusion"}


class TorchEngine:
    """The model itself, in evaluation mode and in the number format that it computes in.

    On a CPU, kernels are swapped in, and the weights of each encoder are packed when it is first used, so that loading
    needs no second copy. A compiled model has few graphs, as inputs come in one form.
    """

    def __init__(
        self,
        model: BridgeTower,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        compiler: str | None = None,
    ) -> None:
        self.model = model.to(device, dtype)
        self.device = device
        self._dtype = dtype
        self._compiler = compiler
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._packed: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_compiled": {}, "_packed": set()}

    def _method(self, name: str) -> Callable[..., Any]:
        """Returns a method of the model, ready to run, also if several threads make the first call at once."""
        with _STARTING:
            if self._compiler is None:
                self._pack(name)
            elif name not in self._compiled:
                options = compiler_options(self._compiler)
                self._compiled[name] = torch.compile(
                    getattr(self.model, name), dynamic=True, **options
                )
        return self._compiled.get(name) or getattr(self.model, name)

    def _pack(self, method: str) -> None:
        """Packs the weights of the encoder that a method runs, and first those outside of all encoders."""
        if not self._packed:
            encoders = [getattr(self.model, name) for name in _ENCODERS.values()]
            pack_weights(self.model, excluded=encoders)
        if method not in self._packed:
            pack_weights(getattr(self.model, _ENCODERS[method]))
            self._packed.add(method)

    def encode_image(
        self,
        pixel_values: Pixels,
        token_type: int = IMAGE,
        *,
        outputs: EncodeOutputs = "layers",
    ) -> Encoded:
        pixel_values = to_device(pixel_values, self.device).to(self._dtype)
        return self._method("encode_image")(pixel_values, token_type, outputs=outputs)

    def encode_text(
        self,
        input_ids: TokenIds,
        attention_mask: Mask = None,
        *,
        outputs: EncodeOutputs = "layers",
    ) -> Encoded:
        input_ids = to_device(input_ids, self.device)
        mask = None if attention_mask is None else to_device(attention_mask, self.device)
        if self._compiler is not None:
            mask = torch.ones_like(input_ids) if mask is None else mask.long()
        return self._method("encode_text")(input_ids, mask, outputs=outputs)

    def cache_image(self, image: Encoded) -> Encoded:
        # The cache is made by layers of the fusion encoder.
        self._method("fuse")
        return self.model.cache_image(image)

    def cache_text(self, text: Encoded) -> Encoded:
        self._method("fuse")
        return self.model.cache_text(text)

    def fuse(self, image: Encoded, text: Encoded, outputs: FusionOutputs = "pooled") -> Fused:
        if self._compiler is not None and image.layers and text.layers:
            image = _in_one_form(image)
            text = _in_one_form(text)
        return self._method("fuse")(image, text, outputs)


def _in_one_form(encoded: Encoded) -> Encoded:
    """Copies selected rows, and makes the CLS a view."""
    layers = tuple(encoded.layers)
    # Fusion reads only the size of the CLS.
    return replace(encoded, layers=layers, cls=layers[0][:, 0])


Engine = TorchEngine | PartsEngine


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """Engine, precision and device of a model, see `load`."""

    engine: EngineName = "torch"
    precision: Precision = "fp32"
    device: str | int | torch.device | None = None
    cache: Path = field(default_factory=cache_folder)
    compile: bool = False

    def __post_init__(self) -> None:
        spec = ENGINES[self.engine]
        if self.precision not in spec.forms:
            raise ValueError(
                f"engine {self.engine} has no {self.precision}; engines that have it: "
                f"{', '.join(engines_with(self.precision))}"
            )
        if self.form is None:
            if find_device(self.device).type == "cpu" and self.precision == "fp16":
                raise ValueError(
                    "precision fp16 is for GPUs; on the CPU use bf16, which takes as little memory, or fp32"
                )
            return
        if self.compile:
            raise ValueError(
                f"engine {self.engine} is not compiled; use engine torch with compile=True"
            )
        if self.device not in (None, "auto", "cpu", torch.device("cpu")):
            raise ValueError(
                f"engine {self.engine} runs on the CPU, not on {self.device}; use engine torch there"
            )
        if spec.extra is not None:
            require(spec.extra, self.engine)

    @property
    def form(self) -> Form | None:
        return ENGINES[self.engine].forms[self.precision]

    @property
    def dtype(self) -> torch.dtype:
        formats = {"bf16": torch.bfloat16, "fp16": torch.float16} if self.form is None else {}
        return formats.get(self.precision, torch.float32)

    def start(self, checkpoint: Checkpoint, folder: Path | None = None) -> Engine:
        if self.form is None:
            model = checkpoint.model(copy=False).requires_grad_(False)
            compiler = "inductor" if self.compile else None
            return TorchEngine(model, find_device(self.device), self.dtype, compiler)
        if folder is not None and is_exported(folder, self.engine, self.form):
            model = exported_model(folder, checkpoint.extensions)
        else:
            folder, model = cached_export(
                checkpoint, self.cache, self.form, progress=sys.stderr.isatty()
            )
        return PartsEngine(model, Runner(self.engine, folder, self.precision))


def choose_engine(
    engine: EngineRequest, precision: Precision, device: str | int | torch.device | None
) -> EngineName:
    """Returns the requested engine. `auto` is torch on a GPU, and the fastest installed engine on a CPU."""
    if engine != "auto":
        return engine
    candidates = engines_with(precision)
    if "torch" in candidates and find_device(device).type != "cpu":
        return "torch"
    # A model that was not exported is exported first.
    can_export = is_installed("onnxscript")
    for name in candidates:
        if name == "torch" or (can_export and is_installed(name)):
            return name
    return candidates[0]


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
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device.type not in ("cpu", "cuda", accelerator and accelerator.type):
        raise ValueError(
            f"device is {name!r}, on which PyTorch cannot compute here; use cpu or cuda:0"
        )
    return device
