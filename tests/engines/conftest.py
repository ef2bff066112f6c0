"""Small models, exported once for all tests that only read them."""

import pytest

from bridgetower.checkpoints import Checkpoint
from bridgetower.engines.export import write_exported
from helpers.models import build_model, changed_config

# What `tiny_checkpoint`, whose export has every part, has not.
OTHER = changed_config(
    vision__num_layers=2,
    text__num_layers=2,
    vision__distillation_token=True,
    vision__pre_norm=False,
    vision__activation="gelu",
    text__positions="bert",
    text__pad_token_id=0,
    fusion__num_layers=1,
    fusion__bridge="adaptive_manager",
    fusion__vision_layers=(1, 2),
    fusion__text_layers=(1, 2),
    fusion__separate_projections=True,
    fusion__num_token_types=3,
    heads__itc=None,
    heads__mlm=False,
)
ONE_LAYER = {f"{tower}__num_layers": 1 for tower in ("vision", "text", "fusion")}
FEW = changed_config(heads__itc=None, heads__mlm=False, **ONE_LAYER)


def _export(config, folder, form="onnx"):
    """Writes a model with random weights and its parts, without preprocessing."""
    model = build_model(config)
    write_exported(
        Checkpoint(source="tiny", config=model.config, tensors=model.state_dict()), folder, form
    )


@pytest.fixture(scope="session")
def other(made_once):
    """A folder with the parts of a model of `tiny` that differs from `tiny_checkpoint` in what there is to choose."""
    return made_once("other", lambda folder: _export(OTHER, folder))


@pytest.fixture(scope="session")
def int8(made_once):
    """A folder with the parts of a model that has few of them, in int8."""
    return made_once("int8", lambda folder: _export(FEW, folder, "onnx-int8"))
