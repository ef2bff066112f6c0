"""A model, and the same images in every kind of source."""

from pathlib import Path

import pytest

from bridgetower.predictor import Predictor, load
from shapes import write_pictures
from sources import write_sources


@pytest.fixture(scope="session")
def predictor(tiny_checkpoint: Path) -> Predictor:
    return load(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 images; not to be changed."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder)
    return folder


@pytest.fixture(scope="session")
def places(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Five of them as every kind of source, by kind; not to be changed."""
    return write_sources(pictures, tmp_path_factory.mktemp("sources"))
