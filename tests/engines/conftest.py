"""Small models, exported once for all tests that only read them."""

from collections.abc import Callable
from functools import partial
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


def _export(name: str, folder: Path) -> None:
    """Writes a model with random weights and its parts, without preprocessing."""
    model = tiny.build(CONFIGS[name])
    write_checkpoint(Checkpoint(source="tiny", config=model.config, tensors=model.state_dict()), folder)
    for part in part_names(model):
        write_graph(make_part(model, part), folder / f"{part}.onnx", folder / "model.safetensors")


def _export_int8(folder: Path) -> None:
    model = tiny.build(CONFIGS["all-else"])
    write_checkpoint(Checkpoint(source="tiny", config=model.config, tensors=model.state_dict()), folder)
    for part in part_names(model):
        write_int8_graph(make_part(model, part), folder / f"{part}.onnx", signed=not products_overflow())


@pytest.fixture(scope="session")
def bridges(made_once: Callable[..., Path]) -> Path:
    """A folder with the parts of a model that has all of them."""
    return made_once("bridges", partial(_export, "bridges"))


@pytest.fixture(scope="session")
def int8(made_once: Callable[..., Path]) -> Path:
    """A folder with the parts of a model that has few of them, in int8."""
    return made_once("int8", _export_int8)


@pytest.fixture(scope="session", params=CONFIGS)
def parts(request: pytest.FixtureRequest, made_once: Callable[..., Path]) -> Path:
    """Folders with the parts of models that differ in what there is to choose."""
    return made_once(request.param, partial(_export, request.param))
