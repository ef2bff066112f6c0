"""Small models, exported once for all tests that only read them."""

from pathlib import Path

import pytest

import tiny
from bridgetower.checkpoints import Checkpoint, write_checkpoint
from bridgetower.engines.onnx_graphs import products_overflow, write_graph, write_int8_graph
from bridgetower.engines.parts import make_part, part_names
from bridgetower.model.presets import meter

CONFIGS = {
    "bridges": tiny.changed(fusion__num_token_types=3),
    "meter-bert": meter(tiny.changed(text__positions="bert", text__pad_token_id=0, heads__itc="fused")),
    "all-else": tiny.changed(
        vision__distillation_token=True,
        vision__pre_norm=False,
        vision__activation="gelu",
        fusion__bridge="adaptive_manager",
        fusion__separate_projections=True,
        heads__itc=None,
        heads__mlm=False,
    ),
}


def _export(name: str, folder: Path) -> Path:
    """Writes a model with random weights and its parts, without preprocessing."""
    model = tiny.build(CONFIGS[name])
    write_checkpoint(Checkpoint(source="tiny", config=model.config, tensors=model.state_dict()), folder)
    for part in part_names(model):
        write_graph(make_part(model, part), folder / f"{part}.onnx", folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def bridges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the parts of a model that has all of them."""
    return _export("bridges", tmp_path_factory.mktemp("bridges") / "model")


@pytest.fixture(scope="session")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the parts of a model that has few of them, in int8."""
    model, folder = tiny.build(CONFIGS["all-else"]), tmp_path_factory.mktemp("int8") / "model"
    write_checkpoint(Checkpoint(source="tiny", config=model.config, tensors=model.state_dict()), folder)
    for part in part_names(model):
        write_int8_graph(make_part(model, part), folder / f"{part}.onnx", signed=not products_overflow())
    return folder


@pytest.fixture(scope="session", params=CONFIGS)
def parts(request: pytest.FixtureRequest, bridges: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with the parts of models that differ in what there is to choose."""
    if request.param == "bridges":
        return bridges
    return _export(request.param, tmp_path_factory.mktemp(request.param) / "model")
