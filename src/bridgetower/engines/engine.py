"""The interface that a predictor is written against, and its implementation by the model itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridgetower.model.bridgetower import IMAGE, BridgeTower, EncodeOutputs
from bridgetower.model.cpu import pack_weights
from bridgetower.model.encodings import Encoded, Fused
from bridgetower.model.fusion import FusionOutputs
from bridgetower.model.layers import allow_graphs

_STARTING = Lock()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor without waiting for a device, from pinned memory for a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Engine(Protocol):
    """Runs the towers and the fusion encoder of one model; its heads run in `model`, on what the engine hands out.

    The methods are those of `BridgeTower`, but take float32 pixels, and inputs on any device, whatever the engine
    computes in and on. Several threads may call them at once.
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
        self.model = model.to(device, dtype).requires_grad_(False)
        self.device, self._dtype, self._compiler = device, dtype, compiler
        self._running: BridgeTower | _Compiled | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_running": None}

    def _started(self) -> BridgeTower | _Compiled:
        """Returns what computes; several threads may make the first call at once."""
        with _STARTING:
            if self._running is None:
                if self._compiler is None:
                    pack_weights(self.model)
                self._running = self.model if self._compiler is None else _Compiled(self.model, self._compiler)
        return self._running

    def encode_image(
        self, pixel_values: Float[Tensor, "b 3 h w"], token_type: int = IMAGE, *, outputs: EncodeOutputs = "layers"
    ) -> Encoded:
        """See `BridgeTower.encode_image`."""
        pixel_values = to_device(pixel_values, self.device).to(self._dtype)
        return self._started().encode_image(pixel_values, token_type, outputs=outputs)

    def encode_text(
        self,
        input_ids: Int[Tensor, "b l"],
        attention_mask: Int[Tensor, "b l"] | Bool[Tensor, "b l"] | None = None,
        *,
        outputs: EncodeOutputs = "layers",
    ) -> Encoded:
        """See `BridgeTower.encode_text`."""
        mask = None if attention_mask is None else to_device(attention_mask, self.device)
        return self._started().encode_text(to_device(input_ids, self.device), mask, outputs=outputs)

    def cache_image(self, image: Encoded) -> Encoded:
        """See `BridgeTower.cache_image`."""
        return self.model.cache_image(image)

    def cache_text(self, text: Encoded) -> Encoded:
        """See `BridgeTower.cache_text`."""
        return self.model.cache_text(text)

    def fuse(self, image: Encoded, text: Encoded, outputs: FusionOutputs = "pooled") -> Fused:
        """See `BridgeTower.fuse`."""
        return self._started().fuse(image, text, outputs)


class _Compiled:
    """A model in few graphs: inputs come in one form, so that only what is read, and one or several, differ."""

    def __init__(self, model: BridgeTower, backend: str) -> None:
        allow_graphs()
        compiled = partial(torch.compile, backend=backend, dynamic=True)
        self.encode_image: Callable[..., Encoded] = compiled(model.encode_image)
        self._text: Callable[..., Encoded] = compiled(model.encode_text)
        self._fuse: Callable[..., Fused] = compiled(model.fuse)

    def encode_text(
        self,
        input_ids: Int[Tensor, "b l"],
        mask: Int[Tensor, "b l"] | Bool[Tensor, "b l"] | None,
        outputs: EncodeOutputs,
    ) -> Encoded:
        mask = torch.ones_like(input_ids) if mask is None else mask
        return self._text(input_ids, mask.long(), outputs=outputs)

    def fuse(self, image: Encoded, text: Encoded, outputs: FusionOutputs) -> Fused:
        if not (image.layers and text.layers):
            raise ValueError('these encodings hold the CLS only; encode with outputs="layers" what is to be fused')
        # Rows are copied, and the CLS, of which only the size is read, is always a view.
        uniform = [
            Encoded(layers := tuple(each.layers), layers[0][:, 0], each.mask, each.first_layer_cache)
            for each in (image, text)
        ]
        return self._fuse(*uniform, outputs)
