"""A folder of images with its index."""

import lancedb
import torch

from bridgetower.search.build import build_index
from bridgetower.search.config import IndexConfig

NAMES = ["00.png", "01.png", "02.png", "03.png", "sub/04.png", "sub/05.png"]


class Album:
    def __init__(self, folder, predictor):
        self.folder, self.out, self.predictor = folder, folder.with_suffix(".lance"), predictor

    def build(self, *sources, **settings):
        return build_index(
            sources or [self.folder], self.out, self.predictor, IndexConfig(**settings)
        )

    def counts(self, *sources, **settings):
        report = self.build(*sources, **settings)
        return report.images, report.added, report.changed, report.removed

    def rows(self):
        table = lancedb.connect(self.out.parent).open_table(self.out.stem).to_arrow()
        return {row["path"]: row for row in table.to_pylist()}

    def captions(self):
        return {path: row["captions"] for path, row in self.rows().items()}

    def check_vectors(self, files):
        rows = self.rows()
        for name, file in files.items():
            expected = self.predictor.embed_images(file)[0]
            torch.testing.assert_close(
                torch.tensor(rows[name]["image_vector"]), expected, atol=1e-5, rtol=0
            )
