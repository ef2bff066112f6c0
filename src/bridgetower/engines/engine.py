"""What computes for a predictor: the model itself on any device, or exported parts on the CPU.

Both have the methods of `BridgeTower`, but take float32 pixels, and inputs on any device, whatever they compute in and
on. Several threads may call them at once. Heads run in `model`, on what an engine hands out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridgetower.engines.parts_engine import PartsEngine
from bridgetower.model.bridgetower import IMAGE, BridgeTower, EncodeOutputs
from bridgetower.model.cpu import pack_weights
from bridgetower.model.fusion import Encoded, Fused, FusionOutputs, Mask
from bridgetower.model.layers import allow_graphs

_STARTING = Lock()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor without waiting for a device, from pinned memory for a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class TorchEngine:
    """The model itself, in evaluation mode and in the number format that it computes in.

    On a CPU, its kernels are swapped in and weights packed when they are first used: loading reads none of them, and
    takes no second copy. A compiled model has few graphs, as inputs come in one form.
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
        self._compiled: dict[str, Callable[..., Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_compiled": None}

    def _started(self, method: str) -> Callable[..., Any]:
        """Returns what computes; several threads may make the first call at once."""
        with _STARTING:
            if self._compiled is None:
                self._compiled = {}
                if self._compiler is None:
                    pack_weights(self.model)
                else:
                    allow_graphs()
                    compiled = partial(torch.compile, backend=self._compiler, dynamic=True)
                    methods = ("encode_image", "encode_text", "fuse")
                    self._compiled = {name: compiled(getattr(self.model, name)) for name in methods}
        return self._compiled.get(method) or getattr(self.model, method)

    def encode_image(
        self, pixel_values: Float[Tensor, "b 3 h w"], token_type: int = IMAGE, *, outputs: EncodeOutputs = "layers"
    ) -> Encoded:
        pixel_values = to_device(pixel_values, self.device).to(self._dtype)
        return self._started("encode_image")(pixel_values, token_type, outputs=outputs)

    def encode_text(
        self, input_ids: Int[Tensor, "b l"], attention_mask: Mask = None, *, outputs: EncodeOutputs = "layers"
    ) -> Encoded:
        input_ids = to_device(input_ids, self.device)
        mask = None if attention_mask is None else to_device(attention_mask, self.device)
        if self._compiler is not None:
            mask = torch.ones_like(input_ids) if mask is None else mask.long()
        return self._started("encode_text")(input_ids, mask, outputs=outputs)

    def cache_image(self, image: Encoded) -> Encoded:
        return self.model.cache_image(image)

    def cache_text(self, text: Encoded) -> Encoded:
        return self.model.cache_text(text)

    def fuse(self, image: Encoded, text: Encoded, outputs: FusionOutputs = "pooled") -> Fused:
        if self._compiler is not None and image.layers and text.layers:
            # Rows are copied, and the CLS, of which only the size is read, is always a view.
            image, text = (
                Encoded(layers := tuple(each.layers), layers[0][:, 0], each.mask, each.first_layer_cache)
                for each in (image, text)
            )
        return self._started("fuse")(image, text, outputs)


Engine = TorchEngine | PartsEngine
