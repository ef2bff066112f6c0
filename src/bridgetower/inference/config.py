"""Settings for embedding and scoring a source. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

from bridgetower.data.config import Cutting
from bridgetower.data.sources.columns import (
    CAPTIONS,
    IMAGES,
    CaptionsFrom,
    Columns,
    RequiredColumn,
)
from bridgetower.plain import AT_LEAST_0, AT_LEAST_1, check_numbers

Content = Literal["images", "texts", "pairs"]
Quantize = Literal["float16", "int8", "binary"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """How the images and texts of a source are read and embedded.

    Attributes:
        image_column: Column of a table with paths, URLs or image bytes; default: one of the usual names.
        caption_column: Column of a table with a caption or a list of captions; default: one of the usual names.
        id_column: Column of a table that names the rows; default: one of the usual names.
        captions_from: What captions are; "folder": the name of the folder that an image is in.
        every: Seconds of each moment of a video; default: a moment for each subtitle, or scene where there are none.
        max_moments: Most moments of one video.
        transcribe: URL of a server that transcribes videos without subtitles, in OpenAI's protocol, such as
            http://localhost:8000/v1; the environment's OPENAI_API_KEY is sent to it. Default: none.
        transcribe_model: Model of that server.
        truncate: Cut captions that are too long for the model; otherwise their image counts as bad.
        max_errors: Number of images that may be left out because they cannot be used; each is named.
        batch_size: Images embedded at once.
        num_workers: Processes that decode images, on Ray of each model; default: one per core where that pays off, and
            on Ray none.
        commit_seconds: Seconds after which what was embedded is written, and in long runs after a hundredth of the time
            so far; a killed run loses no more work than that.
        ray: Address of a Ray cluster that embeds, or "local" for one of this machine; default: this process.
        ray_workers: Models on the cluster; default: one for each GPU, or for each core where there is no GPU.
    """

    image_column: str | None = None
    caption_column: str | None = None
    id_column: str | None = None
    captions_from: CaptionsFrom = "text"
    every: float | None = None
    max_moments: int = 1000
    transcribe: str | None = None
    transcribe_model: str = "whisper-1"
    truncate: bool = True
    max_errors: int = 0
    batch_size: int = 32
    num_workers: int | None = None
    commit_seconds: float = 10.0
    ray: str | None = None
    ray_workers: int | None = None

    def __post_init__(self) -> None:
        """Checks the numbers."""
        check_numbers(
            self,
            max_errors=AT_LEAST_0,
            num_workers=AT_LEAST_0,
            batch_size=AT_LEAST_1,
            ray_workers=AT_LEAST_1,
            commit_seconds=AT_LEAST_0,
        )
        _ = self.cutting  # which is checked
        if self.ray is None and self.ray_workers is not None:
            raise ValueError(
                f"ray_workers {self.ray_workers} would be ignored without ray; leave it out, or give ray"
            )

    @property
    def cutting(self) -> Cutting:
        """How videos are cut."""
        return Cutting(**{field.name: getattr(self, field.name) for field in fields(Cutting)})

    @property
    def columns(self) -> Columns:
        """What is read of tables and videos."""
        return Columns(
            image=self.image_column,
            text=self.caption_column,
            id=self.id_column,
            captions_from=self.captions_from,
            cutting=self.cutting,
            required=self.required_columns,
            text_option="caption_column",
        )

    @property
    def required_columns(self) -> tuple[RequiredColumn, ...]:
        """Which columns a table must have."""
        return (RequiredColumn(headings=(IMAGES,)),)


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(SourceConfig):
    """How vectors are made of a source.

    Attributes:
        of: Embed the images, their texts, or both together; default: images, and texts where there are none.
        quantize: Write vectors in fewer bytes; default: float32.
    """

    of: Content | None = None
    quantize: Quantize | None = None

    @property
    def required_columns(self) -> tuple[RequiredColumn, ...]:
        """Which columns a table must have."""
        images = RequiredColumn(headings=(IMAGES,))
        texts = RequiredColumn(headings=(replace(CAPTIONS, option="caption_column"),))
        either = RequiredColumn(headings=(IMAGES, *texts.headings))
        if self.of is None:
            return (either,)
        has_folders = self.captions_from == "folder"
        return {
            "images": (images,),
            "texts": (texts,),
            "pairs": (images,) if has_folders else (images, texts),
        }[self.of]


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(SourceConfig):
    """How pairs of images and texts of a source are scored."""

    of: ClassVar[Literal["scores"]] = "scores"
    quantize: ClassVar[None] = None

    @property
    def required_columns(self) -> tuple[RequiredColumn, ...]:
        """Which columns a table must have."""
        return EmbedConfig(of="pairs", captions_from=self.captions_from).required_columns
