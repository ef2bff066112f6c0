"""A model, images of shapes to index, and some of them in every kind of source."""

import shutil

import pytest
from album import Album

from bridgetower.inference import vector_files
from bridgetower.search import build
from helpers.shapes import write_shape_pictures
from helpers.sources import write_sources


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_shape_pictures(folder)
    return folder


@pytest.fixture
def album(shapes_folder, predictor, tmp_path):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for number in range(6):
        shutil.copy2(shapes_folder / f"{number:02}.png", folder / ("sub" if number > 3 else ""))
    return Album(folder, predictor)


@pytest.fixture(scope="session")
def source_paths(shapes_folder, tmp_path_factory):
    return write_sources(shapes_folder, tmp_path_factory.mktemp("sources"))


@pytest.fixture
def encoded_batches(predictor):
    batches = []
    patches = predictor.model.vision.patch_embedding
    hook = patches.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    yield batches
    hook.remove()


@pytest.fixture
def interrupt(predictor):
    """Ends a run in the place of the computation of a number, or of another step."""

    def call(number, run, owner=predictor, name="compute"):
        step = getattr(owner, name)
        calls = []

        def failing(*arguments):
            calls.append(arguments)
            if len(calls) >= number:
                raise KeyboardInterrupt
            return step(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, failing)
            with pytest.raises(KeyboardInterrupt):
                run()

    return call


@pytest.fixture
def read_names(monkeypatch):
    names = list[str]()
    read_group = vector_files.read_group

    def noting(source, columns):
        names.append(source.files[0].name)
        return read_group(source, columns)

    for module in (build, vector_files):
        monkeypatch.setattr(module, "read_group", noting)
    return names
