"""How images are put into an index; importable without torch."""

from __future__ import annotations

from dataclasses import dataclass

from bridgetower.bulk.config import BulkConfig


@dataclass(frozen=True, kw_only=True)
class IndexConfig(BulkConfig):
    """How images are put into an index.

    Attributes:
        ann: Also group the vectors, so that searches in large sets are quicker; they may then miss some of the nearest.
        commit_seconds: Time after which what was embedded is written; a killed run loses no more work than that.
    """

    ann: bool = False
    commit_seconds: float = 10.0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        super().__post_init__()
        if self.commit_seconds < 0:
            raise ValueError(f"commit_seconds {self.commit_seconds}; expected at least 0")
