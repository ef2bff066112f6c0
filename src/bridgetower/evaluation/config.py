"""How models are evaluated; importable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Protocol = Literal["honest", "paper"]


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """How retrieval is evaluated.

    Attributes:
        candidates: k of the first stage, per query; published: 128 on Flickr30k, 256 on COCO.
        protocol: `honest` ranks each direction on its own candidates; `paper` on the maximum of both sides.
        max_captions: Captions of each image that are queries; None takes all.
        batch_size: Items or pairs at once.
    """

    candidates: int = 128
    protocol: Protocol = "honest"
    max_captions: int | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        """Checks the numbers and the protocol."""
        for name in ("candidates", "max_captions", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if self.protocol not in get_args(Protocol):
            raise ValueError(f"protocol is {self.protocol!r}; expected one of {', '.join(get_args(Protocol))}")
