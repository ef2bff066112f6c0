"""The interface that a predictor is written against, and its implementation by the model itself."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridgetower.model.bridgetower import IMAGE, BridgeTower, EncodeRead
from bridgetower.model.encodings import Encoded, Fused
from bridgetower.model.fusion import Read
from bridgetower.model.linear import pack_weights


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
        self, pixel_values: Float[Tensor, "b 3 h w"], token_type: int = IMAGE, *, read: EncodeRead = "layers"
    ) -> Encoded:
        """Encodes images."""

    def encode_text(
        self,
        input_ids: Int[Tensor, "b l"],
        attention_mask: Int[Tensor, "b l"] | Bool[Tensor, "b l"] | None = None,
        *,
        read: EncodeRead = "layers",
    ) -> Encoded:
        """Encodes texts."""

    def start_image(self, image: Encoded) -> Encoded:
        """Adds what several texts can share of each image, where the engine shares anything."""

    def start_text(self, text: Encoded) -> Encoded:
        """Adds what several images can share of each text, where the engine shares anything."""

    def fuse(self, image: Encoded, text: Encoded, read: Read = "pooled") -> Fused:
        """Fuses image b with text b, computing only what is read."""


class TorchEngine:
    """The model itself, on any device.

    On a CPU, weights are packed when they are first used: loading reads none of them, and takes no second copy.

    Attributes:
        model: In evaluation mode, on the device, in the number format that it computes in.
        device: Where it is.
    """

    def __init__(self, model: BridgeTower, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Moves the model.

        Args:
            model: As `Checkpoint.model` returns it.
            device: Where to compute.
            dtype: What to compute in.
        """
        self.model = model.to(device, dtype).requires_grad_(False)
        self.device, self._dtype = device, dtype

    @cached_property
    def _packed(self) -> BridgeTower:
        pack_weights(self.model)
        return self.model

    def encode_image(
        self, pixel_values: Float[Tensor, "b 3 h w"], token_type: int = IMAGE, *, read: EncodeRead = "layers"
    ) -> Encoded:
        """See `BridgeTower.encode_image`."""
        return self._packed.encode_image(pixel_values.to(self.device, self._dtype), token_type, read=read)

    def encode_text(
        self,
        input_ids: Int[Tensor, "b l"],
        attention_mask: Int[Tensor, "b l"] | Bool[Tensor, "b l"] | None = None,
        *,
        read: EncodeRead = "layers",
    ) -> Encoded:
        """See `BridgeTower.encode_text`."""
        mask = None if attention_mask is None else attention_mask.to(self.device)
        return self._packed.encode_text(input_ids.to(self.device), mask, read=read)

    def start_image(self, image: Encoded) -> Encoded:
        """See `BridgeTower.start_image`."""
        return self._packed.start_image(image)

    def start_text(self, text: Encoded) -> Encoded:
        """See `BridgeTower.start_text`."""
        return self._packed.start_text(text)

    def fuse(self, image: Encoded, text: Encoded, read: Read = "pooled") -> Fused:
        """See `BridgeTower.fuse`."""
        return self._packed.fuse(image, text, read)
