"""What the towers and the fusion encoder hand out: encodings that can be cut, joined and repeated, and fused pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridgetower.model.fusion import FirstLayerCache

Index = Int[Tensor, " n"] | Bool[Tensor, " b"] | slice
Mask = Int[Tensor, "b l"] | Bool[Tensor, "b l"] | None


class TakenLayers(Sequence[Tensor]):
    """Rows of the layers of an encoding, each layer copied only when it is read, and not kept."""

    def __init__(self, layers: Sequence[Float[Tensor, "b l d"]], rows: Int[Tensor, " n"]) -> None:
        self.layers: Sequence[Tensor] = layers
        self.rows: Tensor = rows
        if isinstance(layers, TakenLayers):
            self.layers, self.rows = layers.layers, layers.rows[rows]

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return TakenLayers(self.layers[index], self.rows)
        return self.layers[index][self.rows]


@dataclass(frozen=True)
class Encoded:
    """One modality of a batch, ready to be fused with any encoding of the other modality.

    Attributes:
        layers: The bridged hidden states of the tower, projected to the fusion width, token type added.
        cls: The tower's last CLS before projection, the contrastive head's input.
        mask: False on padding; None if nothing is padded (always for images).
        first_layer_cache: What the first fusion layer computes of it alone; None: computed again in every `fuse`.
    """

    layers: Sequence[Float[Tensor, "b l d"]]
    cls: Float[Tensor, "b w"]
    mask: Bool[Tensor, "b l"] | None = None
    first_layer_cache: FirstLayerCache | None = None

    def __len__(self) -> int:
        return len(self.cls)

    def __getitem__(self, index: Index) -> Encoded:
        """Selects samples; an index may repeat, so one encoding serves many pairs."""
        if isinstance(index, slice) and not isinstance(self.layers, TakenLayers):
            return self.map(lambda tensor: tensor[index])
        rows = torch.arange(len(self), device=self.cls.device)[index]
        mask = None if self.mask is None else self.mask[rows]
        cache = _mapped(self.first_layer_cache, lambda tensor: tensor[rows])
        return Encoded(TakenLayers(self.layers, rows), self.cls[rows], mask, cache)

    def map(self, function: Callable[[Tensor], Tensor]) -> Encoded:
        mask = None if self.mask is None else function(self.mask)
        cache = _mapped(self.first_layer_cache, function)
        return Encoded(tuple(map(function, self.layers)), function(self.cls), mask, cache)

    def padded(self, length: int) -> Encoded:
        missing = length - self.layers[0].shape[1]
        if missing < 0:
            raise ValueError(f"{self.layers[0].shape[1]} tokens do not fit into {length}; pad to at least as many")
        mask = self.mask
        if mask is None:
            mask = torch.ones(self.layers[0].shape[:2], dtype=torch.bool, device=self.cls.device)

        def pad(tokens: Tensor) -> Tensor:
            return F.pad(tokens, (0, 0, 0, missing))

        cache = _mapped(self.first_layer_cache, pad)
        return Encoded(tuple(map(pad, self.layers)), self.cls, F.pad(mask, (0, missing)), cache)

    @staticmethod
    def cat(parts: Sequence[Encoded]) -> Encoded:
        """Joins batches along samples, padding texts of different lengths to the longest."""
        if not parts:
            raise ValueError("no encodings given; expected at least one")
        lengths = {part.layers[0].shape[1] for part in parts if part.layers}
        if len(lengths) > 1 or any(part.mask is not None for part in parts):
            parts = [part.padded(max(lengths)) for part in parts]
        caches = [part.first_layer_cache for part in parts if part.first_layer_cache is not None]
        return Encoded(
            layers=tuple(torch.cat(layer) for layer in zip(*(part.layers for part in parts), strict=True)),
            cls=torch.cat([part.cls for part in parts]),
            mask=None if parts[0].mask is None else torch.cat([part.mask for part in parts if part.mask is not None]),
            first_layer_cache=FirstLayerCache(*map(torch.cat, zip(*caches, strict=True)))
            if len(caches) == len(parts)
            else None,
        )


class Fused:
    """Outputs of the fusion encoder as far as they were asked for: both streams, and their pooled outputs together."""

    def __init__(self, text: Tensor | None = None, image: Tensor | None = None, pooled: Tensor | None = None) -> None:
        self._text, self._image, self._pooled = text, image, pooled

    @property
    def text(self) -> Float[Tensor, "b l d"]:
        return _read(self._text, "text", '"text" or "all"')

    @property
    def image(self) -> Float[Tensor, "b p d"]:
        return _read(self._image, "image", '"all"')

    @property
    def pooled(self) -> Float[Tensor, "b e"]:
        return _read(self._pooled, "pooled", '"pooled" or "all"')

    @staticmethod
    def cat(parts: Sequence[Fused]) -> Fused:
        outputs = zip(*((part._text, part._image, part._pooled) for part in parts), strict=True)
        return Fused(*(None if each[0] is None else torch.cat(each) for each in outputs))


def _mapped(cache: FirstLayerCache | None, function: Callable[[Tensor], Tensor]) -> FirstLayerCache | None:
    return None if cache is None else FirstLayerCache(*map(function, cache))


def _read(output: Tensor | None, name: str, outputs: str) -> Tensor:
    if output is None:
        raise ValueError(f"{name} was not computed; call fuse with outputs={outputs}")
    return output
