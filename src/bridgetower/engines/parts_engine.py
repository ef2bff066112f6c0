"""A predictor's engine made of exported parts."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridgetower.engines.parts import PartName
from bridgetower.engines.runners import Runner
from bridgetower.model.bridgetower import IMAGE, BridgeTower, EncodeOutputs
from bridgetower.model.cpu import optimize_for_cpu
from bridgetower.model.encodings import Encoded, Fused
from bridgetower.model.fusion import FusionOutputs


class PartsEngine:
    """Runs towers and fusion encoder as exported parts, on the CPU; the heads run in PyTorch.

    Attributes:
        model: The network that was exported; of its weights, only those of the heads are read.
        device: The CPU.
    """

    def __init__(self, model: BridgeTower, runner: Runner) -> None:
        self.model, self.device = model.requires_grad_(False), torch.device("cpu")
        self._runner = runner
        optimize_for_cpu(model)

    def encode_image(
        self, pixel_values: Float[Tensor, "b 3 h w"], token_type: int = IMAGE, *, outputs: EncodeOutputs = "layers"
    ) -> Encoded:
        """Encodes images, see `BridgeTower.encode_image`."""
        side = self.model.config.vision.image_size
        if pixel_values.shape[-2:] != (side, side):
            raise ValueError(
                f"images of {pixel_values.shape[-1]} x {pixel_values.shape[-2]} pixels; this engine was built for "
                f"{side} x {side}: pass image_size to load"
            )
        if outputs == "cls":
            return Encoded((), self._run("image_cls", pixel_values)[0])
        *layers, cls = self._run("image", pixel_values)
        token_types = self.model.token_type_embedding.weight
        if token_type != IMAGE:  # the part adds the one of a single image
            layers = [layer + (token_types[token_type] - token_types[IMAGE]) for layer in layers]
        return Encoded(tuple(layers), cls)

    def encode_text(
        self,
        input_ids: Int[Tensor, "b l"],
        attention_mask: Int[Tensor, "b l"] | Bool[Tensor, "b l"] | None = None,
        *,
        outputs: EncodeOutputs = "layers",
    ) -> Encoded:
        """Encodes texts, see `BridgeTower.encode_text`."""
        self.model.config.text.check_length(input_ids.shape[1])
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(torch.int64)
        if outputs == "cls":
            return Encoded((), self._run("text_cls", input_ids, mask)[0])
        *layers, cls = self._run("text", input_ids, mask)
        return Encoded(tuple(layers), cls, None if attention_mask is None else attention_mask.bool())

    def cache_image(self, image: Encoded) -> Encoded:
        """Returns `image`: parts share nothing between pairs."""
        return image

    def cache_text(self, text: Encoded) -> Encoded:
        """Returns `text`: parts share nothing between pairs."""
        return text

    def fuse(self, image: Encoded, text: Encoded, outputs: FusionOutputs = "pooled") -> Fused:
        """Fuses pairs, see `BridgeTower.fuse`."""
        if outputs == "all":
            raise ValueError('outputs="all" is not exported; expected "pooled" or "text", or load with engine="torch"')
        if len(image) != len(text):
            raise ValueError(
                f"{len(image)} images and {len(text)} texts; expected one text per image: index them first"
            )
        mask = torch.ones(text.layers[0].shape[:2]) if text.mask is None else text.mask
        streams = (*image.layers, *text.layers, mask.to(torch.int64))
        if outputs == "text":
            (hidden,) = self._run("fusion_text", *streams)
            return Fused(text=hidden)
        (pooled,) = self._run("fusion_pooled", *streams)
        return Fused(pooled=pooled)

    def _run(self, part: PartName, *inputs: Tensor) -> list[Tensor]:
        arrays = [np.ascontiguousarray(tensor.numpy()) for tensor in inputs]
        return [torch.from_numpy(output) for output in self._runner.run(part, arrays)]
