"""The held-out pictures as files, and an index of them to search in."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from bridgetower.data.splits import read_split
from bridgetower.files import write_bytes
from bridgetower.predictor import Predictor
from bridgetower.search.build import build_index
from bridgetower.search.config import IndexConfig
from bridgetower.search.index import Index


def write_held_out(datasets: Mapping[str, Path], folder: Path) -> None:
    """Writes the test pictures of data sets as files, each with a text file of its captions beside it.

    A file that is there with the same content is left as it is, so that its time stays.

    Args:
        datasets: Prepared folders by name; each gets a folder of that name.
        folder: Where to write.
    """
    for name, dataset in datasets.items():
        rows = read_split(dataset, "test")
        for row in map(rows.row, range(len(rows))):
            picture = folder / name / row["image"]["path"]
            _write(picture, row["image"]["bytes"])
            _write(picture.with_suffix(".txt"), "".join(f"{caption}\n" for caption in row["captions"]).encode())


def index_held_out(folder: Path, uri: Path, predictor: Predictor) -> None:
    """Brings the index of held-out pictures up to date; one of another model, such as of an earlier demo, is replaced.

    Args:
        folder: From `write_held_out`.
        uri: The index.
        predictor: The model.
    """
    if Index.exists(uri) and Index(uri).info.fingerprint != predictor.fingerprint:
        shutil.rmtree(uri)
    build_index(folder, uri, predictor, IndexConfig(truncate=True, num_workers=0))


def _write(path: Path, content: bytes) -> None:
    if not (path.exists() and path.read_bytes() == content):
        write_bytes(path, content)
