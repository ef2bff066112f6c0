"""What frozen towers said of images or texts before: it stands in for pixel values and token ids."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor


class CachedFeatures(ABC):
    """The bridged hidden states of one tower for some images or texts, read when they are asked for."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images or texts."""

    @abstractmethod
    def layers(self) -> list[Float[Tensor, "b l w"]]:
        """Returns the hidden states of every bridged layer; shorter rows are filled up with zeros."""

    @abstractmethod
    def cls(self) -> Float[Tensor, "b w"]:
        """Returns the CLS of the last one."""

    @classmethod
    @abstractmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Joins outputs of one tower along samples."""

    def to(self, device: torch.device) -> Self:
        """Returns itself: the model moves what it reads to its own device."""
        return self
