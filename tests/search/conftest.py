"""A model, images of shapes to index, and some of them in every kind of source."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from album import Album

from bridgetower.predictor import Predictor, load
from bridgetower.search import build, embed
from shapes import write_pictures
from sources import write_sources


@pytest.fixture(scope="session")
def predictor(tiny_checkpoint: Path) -> Predictor:
    return load(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 images and a table of their captions; not to be changed."""
    folder = tmp_path_factory.mktemp("shapes")
    write_pictures(folder)
    return folder


@pytest.fixture
def album(shapes_folder: Path, predictor: Predictor, tmp_path: Path) -> Album:
    """Six images, two of them in a folder in the folder."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for number in range(6):
        shutil.copy2(shapes_folder / f"{number:02}.png", folder / ("sub" if number > 3 else ""))
    return Album(folder, predictor)


@pytest.fixture(scope="session")
def places(shapes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Five of them as every kind of source, by kind; not to be changed."""
    return write_sources(shapes_folder, tmp_path_factory.mktemp("sources"))


@pytest.fixture
def encoded(predictor: Predictor) -> Iterator[list[int]]:
    """How many images went through the image tower, a number per batch."""
    batches: list[int] = []
    hook = predictor.model.vision.patch_embedding.register_forward_hook(
        lambda module, inputs, output: batches.append(len(inputs[0]))
    )
    yield batches
    hook.remove()


@pytest.fixture
def stopped(predictor: Predictor) -> Callable[[int, Callable[[], object]], None]:
    """Ends a call, in which each image is a batch, in the place of the computation of a number."""

    def call(number: int, run: Callable[[], object]) -> None:
        compute, calls = predictor.compute, list[int]()

        def failing(items: Any) -> Any:
            calls.append(len(items))
            if len(calls) == number:
                raise KeyboardInterrupt
            return compute(items)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(predictor, "compute", failing)
            with pytest.raises(KeyboardInterrupt):
                run()

    return call


@pytest.fixture
def read_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files of sources that are read."""
    names, read_part = list[str](), embed.read_part

    def noting(part: Any, columns: Any) -> Any:
        names.append(part.files[0].name)
        return read_part(part, columns)

    for module in (build, embed):
        monkeypatch.setattr(module, "read_part", noting)
    return names
