"""The interface that a predictor is written against, and its implementation by the model itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridgetower.model.bridgetower import IMAGE, BridgeTower, EncodeOutputs
from bridgetower.model.cpu import pack_weights
from bridgetower.model.encodings import Encoded, Fused
from bridgetower.model.fusion import FusionOutputs


class Engine(Protocol):
    """Runs the towers and the fusion encoder of one model; its heads run in `model`, on what the engine hands out.

    The methods are those of `BridgeTower`, but take float32 inputs on the CPU, whatever the engine computes in and on.
    """

    @property
    def model(self) -> BridgeTower:
        """The network in PyTorch, in evaluation mode."""

    @property
    def device(self) -> torch.device:
        """Where the encodings are."""

    def encode_image(
        self, pixel_values: Float[Tensor, "b 3 h w"], token_type: int = IMAGE, *, outputs: EncodeOutputs = "layers"
    ) -> Encoded:
        """Encodes images."""

    def encode_text(
        self,
        input_ids: Int[Tensor, "b l"],
        attention_mask: Int[Tensor, "b l"] | Bool[Tensor, "b l"] | None = None,
        *,
        outputs: EncodeOutputs = "layers",
    ) -> Encoded:
        """Encodes texts."""

    def cache_image(self, image: Encoded) -> Encoded:
        """Adds what several texts can share of each image, where the engine shares anything."""

    def cache_text(self, text: Encoded) -> Encoded:
        """Adds what several images can share of each text, where the engine shares anything."""

    def fuse(self, image: Encoded, text: Encoded, outputs: FusionOutputs = "pooled") -> Fused:
        """Fuses image b with text b, computing only what is read."""


class TorchEngine:
    """The model itself, on any device.

    On a CPU, its kernels are swapped in and weights packed when they are first used: loading reads none of them, and
    takes no second copy.

    Attributes:
        model: In evaluation mode, on the device, in the number format that it computes in.
        device: Where it is.
    """

    def __init__(
        self,
        model: BridgeTower,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        compiler: str | None = None,
    ) -> None:
        """Moves the model.

        Args:
            model: As `Checkpoint.model` returns it.
            device: Where to compute.
            dtype: What to compute in.
            compiler: Backend of `torch.compile` for encoding and fusing, one graph each for any batch and text length;
                it is then asked when they are first called, and the weights stay as they are. None compiles nothing.
        """
        self.model = model.to(device, dtype).requires_grad_(False)
        self.device, self._dtype, self._compiler = device, dtype, compiler

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_calls"}

    @cached_property
    def _calls(self) -> _Calls:
        model = self.model
        if self._compiler is not None:
            compile_call = partial(torch.compile, backend=self._compiler, dynamic=True, fullgraph=True)
            return _Calls(*map(compile_call, (model.encode_image, model.encode_text, model.fuse)))
        pack_weights(model)
        return _Calls(model.encode_image, model.encode_text, model.fuse)

    def encode_image(
        self, pixel_values: Float[Tensor, "b 3 h w"], token_type: int = IMAGE, *, outputs: EncodeOutputs = "layers"
    ) -> Encoded:
        """See `BridgeTower.encode_image`."""
        return self._calls.encode_image(pixel_values.to(self.device, self._dtype), token_type, outputs=outputs)

    def encode_text(
        self,
        input_ids: Int[Tensor, "b l"],
        attention_mask: Int[Tensor, "b l"] | Bool[Tensor, "b l"] | None = None,
        *,
        outputs: EncodeOutputs = "layers",
    ) -> Encoded:
        """See `BridgeTower.encode_text`."""
        mask = None if attention_mask is None else attention_mask.to(self.device)
        return self._calls.encode_text(input_ids.to(self.device), mask, outputs=outputs)

    def cache_image(self, image: Encoded) -> Encoded:
        """See `BridgeTower.cache_image`."""
        return self.model.cache_image(image)

    def cache_text(self, text: Encoded) -> Encoded:
        """See `BridgeTower.cache_text`."""
        return self.model.cache_text(text)

    def fuse(self, image: Encoded, text: Encoded, outputs: FusionOutputs = "pooled") -> Fused:
        """See `BridgeTower.fuse`."""
        return self._calls.fuse(image, text, outputs)


@dataclass(frozen=True)
class _Calls:
    """What computes, as the model has it or compiled."""

    encode_image: Callable[..., Encoded]
    encode_text: Callable[..., Encoded]
    fuse: Callable[..., Fused]
