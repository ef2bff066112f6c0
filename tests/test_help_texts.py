"""Every setting is described under its own name: that is where the command line takes its help from."""

import re
from dataclasses import fields, is_dataclass

import pytest

from bridgetower.data.config import DataConfig, MaskingConfig, PrepareConfig
from bridgetower.data.datasets import DATASETS
from bridgetower.data.datasets.spec import ArrowConfig
from bridgetower.data.own import OWN_SETS
from bridgetower.evaluation.config import RetrievalConfig
from bridgetower.model.config import FusionConfig, HeadsConfig, ModelConfig, TextConfig, VisionConfig
from bridgetower.search.config import IndexConfig
from bridgetower.serve.config import ServeConfig

CONFIGS = [
    *(VisionConfig, TextConfig, FusionConfig, HeadsConfig, ModelConfig),
    *(DataConfig, MaskingConfig, PrepareConfig, ArrowConfig),
    *(spec.config for spec in (*OWN_SETS.values(), DATASETS["vg"], DATASETS["vgqa"])),
    *(RetrievalConfig, IndexConfig, ServeConfig),
]


def described(docstring):
    """Names with an entry of their own under "Attributes"."""
    _, _, attributes = (docstring or "").partition("Attributes:\n")
    return re.findall(r"^ {8}(\w+): \S", attributes, re.MULTILINE)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_own_field_has_an_entry_in_order(config):
    inherited = {item.name for base in config.__bases__ if is_dataclass(base) for item in fields(base)}
    own = [name for name in described(config.__doc__) if name not in inherited]
    assert own == [item.name for item in fields(config) if item.name not in inherited]


def test_control_fields_that_share_an_entry_are_missed():
    assert described("X.\n\n    Attributes:\n        a, b: Two.\n        c: One.\n") == ["c"]
