"""What settings refuse when they are made, and how the command line describes them."""

import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from bridgetower.data.config import Cutting, DataConfig, MaskingConfig, PrepareConfig
from bridgetower.data.sets.custom import CUSTOM_SETS, PairsConfig
from bridgetower.data.sets.datasets import DATASETS
from bridgetower.data.sets.datasets.spec import ArrowConfig
from bridgetower.engines.engine import EngineChoice
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.model.config import (
    FusionConfig,
    HeadsConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from bridgetower.objectives.config import Phase, PretrainingConfig, RankingConfig
from bridgetower.search.config import IndexConfig
from bridgetower.serve.config import ServeConfig
from bridgetower.tasks.run_config import OptimizerConfig, RunConfig

SETTINGS = json.loads((Path(__file__).parent / "settings.json").read_text())
TYPES = {
    config.__name__: config
    for config in (
        *(Cutting, DataConfig, EngineChoice, HeadsConfig, MaskingConfig, OptimizerConfig),
        *(PairsConfig, Phase, PretrainingConfig, RankingConfig, RetrievalConfig, RunConfig),
        *(TextConfig, VisionConfig),
    )
}


def built(name, values):
    return TYPES[name](
        **{
            field: tuple(value) if isinstance(value, list) else value
            for field, value in values.items()
        }
    )


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [(name, *case) for name in SETTINGS for case in SETTINGS[name]["refused"]],
)
def test_unfit_values(name, values, message):
    with pytest.raises(ValueError, match=message):
        built(name, values)


@pytest.mark.parametrize("name", SETTINGS)
def test_values_at_the_bounds_fit(name):
    for values in SETTINGS[name]["accepted"]:
        built(name, values)


@pytest.mark.parametrize("ends", [(), (0.5,), (0.5, 0.5, 1.0), (0.7, 0.3, 1.0), (1.0, 0.5)])
def test_phases_end_in_order(ends):
    with pytest.raises(ValueError, match="expected increasing shares of which the last is 1"):
        PretrainingConfig(phases=tuple(Phase(until=end) for end in ends))


def test_negatives_of_other_processes_are_hard_ones():
    with pytest.raises(ValueError, match="but no phase has hard negatives"):
        PretrainingConfig(phases=(Phase(negatives="uniform"),), negatives_from="world")
    PretrainingConfig(phases=(Phase(negatives="hard"),), negatives_from="world")


CONFIGS = [
    *(VisionConfig, TextConfig, FusionConfig, HeadsConfig, ModelConfig),
    *(DataConfig, MaskingConfig, PrepareConfig, ArrowConfig),
    *(spec.config for spec in (*CUSTOM_SETS.values(), DATASETS["vg"], DATASETS["vgqa"])),
    *(RetrievalConfig, IndexConfig, ServeConfig),
]


def described(docstring):
    """Names with an entry of their own under "Attributes"."""
    _, _, attributes = (docstring or "").partition("Attributes:\n")
    return re.findall(r"^ {8}(\w+): \S", attributes, re.MULTILINE)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_own_field_has_an_entry_in_order(config):
    inherited = {
        item.name for base in config.__bases__ if is_dataclass(base) for item in fields(base)
    }
    names = [name for name in described(config.__doc__) if name not in inherited]
    assert names == [item.name for item in fields(config) if item.name not in inherited]


def test_control_fields_that_share_an_entry_are_missed():
    assert described("X.\n\n    Attributes:\n        a, b: Two.\n        c: One.\n") == ["c"]
