"""The settings of a fit, by the rules of docs/fit.md."""

import pytest

from bridgetower.files import differences
from bridgetower.fitting.rules import Splits, choose_trained, chosen_config, recipe_of
from bridgetower.model.config import HeadsConfig
from bridgetower.tasks.table import RECIPES
from helpers.contracts import check_contract

DRAWN = Splits(validation="validation", test="test", fractions=(0.1, 0.2))


TOWER = HeadsConfig(itc="tower")


def config_of(kind="pairs", splits=DRAWN, *, heads=TOWER, **changes):
    values = {
        "num_examples": 1000,
        "trained": "fusion",
        "init": "model" if heads else None,
        "folder": "data",
        "precision": "fp32",
        "max_length": None,
    }
    return chosen_config(recipe_of(kind, heads), splits, **{**values, **changes})


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "max_epochs", "log_every"),
    [
        (10, 1, 40, 2),
        (15, 1, 27, 3),
        (16, 2, 40, 2),
        (511, 32, 27, 3),
        (512, 64, 40, 2),
        (4000, 64, 7, 15),
        (10_000, 64, 4, 39),
    ],
)
def test_batches_and_epochs(num_examples, batch_size, max_epochs, log_every):
    config = config_of(num_examples=num_examples)
    numbers = (config.batch_size, config.max_epochs, config.log_every)
    assert numbers == (batch_size, max_epochs, log_every)


def test_settings():
    """What differs from the recipe."""
    folds = Splits(train=("fold-1", "fold-2"), folds=2)
    fused = HeadsConfig(itc="fused")
    configs = {
        "all weights": config_of("classification", trained="all", precision="bf16"),
        "folds": config_of("classification", folds),
        "fused": config_of(heads=fused, max_length=20),
        "random weights": config_of(heads=None, trained="all", max_length=90),
        "random weights, vqa": config_of("vqa", Splits(test="test"), heads=None, trained="all"),
        "top layers": config_of("regression", trained="top"),
    }
    for kind in ("pairs", "vqa", "entailment", "image-pairs"):
        configs[kind] = config_of(kind)
    settings = {}
    for name, config in configs.items():
        recipe = RECIPES[config.recipe]
        settings[name] = {"recipe": recipe.recipe}
        for field, _, value in differences(recipe.to_dict(), config.to_dict()):
            settings[name][field] = value
    check_contract("fits", settings)
    assert [choose_trained(device) for device in ("cpu", "cuda")] == ["fusion", "all"]
