"""The demo on few images. As a script it runs from scratch with two steps of each training, or prepares a set."""

import sys
from dataclasses import replace
from functools import partial
from itertools import islice

from bridgetower.training.run import train
from bridgetower_demo import __main__, plan, run, toysets
from bridgetower_demo.costs import model_cost
from bridgetower_demo.recipes import task_of
from bridgetower_demo.toysets.collection import write_collection

FEW = {"train": 64, "validation": 12, "test": 20}


def write_few(out, collection, **options):
    splits = {split: islice(records, FEW[split]) for split, records in collection.splits.items()}
    return write_collection(out, replace(collection, splits=splits), **options)


def make_small(change):
    """Changes the sets that the demo writes, the batches of its recipes, and how often it measures a pass."""
    change(toysets, "write_collection", write_few)
    change(
        run,
        "RECIPES",
        {name: replace(recipe, batch_size=16) for name, recipe in run.RECIPES.items()},
    )
    change(run, "model_cost", partial(model_cost, repeats=1, warmup=0))


def train_here(runs, **_):
    for folder, config in runs.items():
        train(config, folder, task=task_of(config), progress=False)


if __name__ == "__main__":
    make_small(setattr)
    shallow = {"vision.num_layers": 2, "text.num_layers": 1, "fusion.num_layers": 1}
    ours = {
        name: recipe
        for name, recipe in run.RECIPES.items()
        if name.startswith(("pretrain-nano", "scenes-vqa"))
    }
    run.RECIPES = {
        name: replace(recipe, model=recipe.model.override(shallow)) for name, recipe in ours.items()
    }
    run.train_all = train_here
    plan.NUM_VALIDATION = FEW["validation"]
    plan.NUM_TEST = FEW["test"]
    __main__.main(sys.argv[1:] or ["--from-scratch", "--minutes", "0.01"])
