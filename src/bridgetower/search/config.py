"""Settings of an index, and kinds of search. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bridgetower.inference.config import SourceConfig

Vectors = Literal["images", "captions", "pairs"]
Against = Literal["images", "captions", "pairs", "words", "hybrid"]
"""What a query is compared with: vectors, the words of captions and transcripts, or words and vectors together."""


@dataclass(frozen=True, kw_only=True)
class IndexConfig(SourceConfig):
    """How images are put into an index.

    Attributes:
        ann: Also group the vectors, so that searches in large sets are quicker; they may then miss some of the nearest.
    """

    ann: bool = False
