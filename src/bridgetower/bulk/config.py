"""How the images and texts of a source are embedded; importable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bridgetower.data.items import Columns
from bridgetower.data.sources import CaptionsFrom
from bridgetower.model.plain import check_numbers

Part = Literal["images", "texts", "pairs"]
Quantize = Literal["float16", "int8", "binary"]


@dataclass(frozen=True, kw_only=True)
class BulkConfig:
    """How the images and texts of a source are read and embedded.

    Attributes:
        image_column: Column of a table with paths, URLs or image bytes; None looks for the usual names.
        caption_column: Column of a table with a caption or a list of captions; None looks for the usual names.
        id_column: Column of a table that names the rows; None looks for the usual names.
        captions_from: "folder" takes the name of the folder that an image is in as its caption.
        truncate: Cut captions that are too long for the model; otherwise their image counts as bad.
        max_errors: Number of images that may be left out because they cannot be used; each is named.
        batch_size: Images embedded at once.
        num_workers: Processes that decode images; None starts one per core where that pays off.
    """

    image_column: str | None = None
    caption_column: str | None = None
    id_column: str | None = None
    captions_from: CaptionsFrom = "text"
    truncate: bool = True
    max_errors: int = 0
    batch_size: int = 32
    num_workers: int | None = None

    def __post_init__(self) -> None:
        """Checks the counts."""
        check_numbers(self)
        if self.max_errors < 0 or self.batch_size < 1 or (self.num_workers or 0) < 0:
            raise ValueError(
                f"max_errors {self.max_errors}, batch_size {self.batch_size}, num_workers {self.num_workers}; "
                "expected at least 0, 1 and 0"
            )

    @property
    def columns(self) -> Columns:
        """The columns that are read."""
        return Columns(
            image=self.image_column, text=self.caption_column, id=self.id_column, captions_from=self.captions_from
        )


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(BulkConfig):
    """How vectors are made of a source.

    Attributes:
        of: Embed the images, their texts, or both together; None: images, and texts where there is no image.
        quantize: Write vectors in fewer bytes; None: float32.
        block_size: Items that are written together; a killed run does no more than one block again.
    """

    of: Part | None = None
    quantize: Quantize | None = None
    block_size: int = 512

    def __post_init__(self) -> None:
        """Checks the counts."""
        super().__post_init__()
        if self.block_size < 1:
            raise ValueError(f"block_size is {self.block_size}; expected at least 1")
