"""A folder of images with its index."""

from pathlib import Path
from typing import Any

import lancedb
import torch

from bridgetower.predictor import Predictor
from bridgetower.search.build import IndexReport, build_index
from bridgetower.search.config import IndexConfig

NAMES = ["00.png", "01.png", "02.png", "03.png", "sub/04.png", "sub/05.png"]


class Album:
    """Images or videos, and their index beside their folder."""

    def __init__(self, folder: Path, predictor: Predictor) -> None:
        self.folder, self.out, self.predictor = folder, folder.with_suffix(".lance"), predictor

    def build(self, *sources: Path, **settings: Any) -> IndexReport:
        """Brings the index up to date with the images, or with other sources."""
        return build_index(sources or [self.folder], self.out, self.predictor, IndexConfig(**settings))

    def counts(self, *sources: Path, **settings: Any) -> tuple[int, ...]:
        """Does so; returns how many images there are, and how many were added, changed and removed."""
        report = self.build(*sources, **settings)
        return report.images, report.added, report.changed, report.removed

    def rows(self) -> dict[str, dict[str, Any]]:
        """What the index has, by path."""
        table = lancedb.connect(self.out.parent).open_table(self.out.stem).to_arrow()
        return {row["path"]: row for row in table.to_pylist()}

    def captions(self) -> dict[str, list[str]]:
        return {path: row["captions"] for path, row in self.rows().items()}

    def check_vectors(self, files: dict[str, Path]) -> None:
        rows = self.rows()
        for name, file in files.items():
            expected = self.predictor.embed_images(file)[0]
            torch.testing.assert_close(torch.tensor(rows[name]["image_vector"]), expected, atol=1e-5, rtol=0)
