"""How images are put into an index; importable without torch."""

from __future__ import annotations

from dataclasses import dataclass

from bridgetower.data.sources import CaptionsFrom
from bridgetower.model.plain import check_numbers


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """How images are put into an index.

    Attributes:
        image_column: Column of a table with paths; None looks for the usual names.
        caption_column: Column of a table with a caption or a list of captions; None looks for the usual names.
        captions_from: "folder" takes the name of the folder that an image is in as its caption.
        truncate: Cut captions that are too long; otherwise their image counts as bad.
        ann: Also group the vectors, so that searches in large sets are quicker; they may then miss some of the nearest.
        max_errors: Number of images that may be left out because they cannot be read; each is named.
        batch_size: Images embedded at once.
        num_workers: Processes that decode images; None starts one per core where that pays off.
        commit_seconds: Time after which what was embedded is written; a killed run loses no more work than that.
    """

    image_column: str | None = None
    caption_column: str | None = None
    captions_from: CaptionsFrom = "text"
    truncate: bool = False
    ann: bool = False
    max_errors: int = 0
    batch_size: int = 32
    num_workers: int | None = None
    commit_seconds: float = 10.0

    def __post_init__(self) -> None:
        """Checks the counts."""
        check_numbers(self)
        if self.max_errors < 0 or self.batch_size < 1 or (self.num_workers or 0) < 0 or self.commit_seconds < 0:
            raise ValueError(
                f"max_errors {self.max_errors}, batch_size {self.batch_size}, num_workers {self.num_workers}, "
                f"commit_seconds {self.commit_seconds}; expected at least 0, 1, 0 and 0"
            )
