"""Runs with frozen towers up to their examples, and the same examples for towers that are asked."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridgetower.data.batch import CachedFeatures
from bridgetower.data.frozen import CachedViews, FrozenDataset, key_ids
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.frozen import frozen_examples
from bridgetower.training.loop import make_fabric
from bridgetower.training.setup import TaskSetup, build_task
from bridgetower.training.start import starting_checkpoint


def prepared(config: RunConfig, out: Path) -> tuple[BridgeTower, TaskSetup, FrozenDataset]:
    """Model, work and examples of a run as `train` makes them."""
    out.mkdir(exist_ok=True)
    checkpoint = starting_checkpoint(config)
    model = checkpoint.model().train()
    work = build_task(config, checkpoint, model)
    return model, work, frozen_examples(config, model, work, out, make_fabric(config), progress=False)


def recomputed(batch: Any, work: TaskSetup, examples: FrozenDataset) -> Any:
    """The same batch with pixels and token ids."""
    pictures, processor = work.images[0], work.images[0].processor
    frozen, pictures.frozen = pictures.frozen, None
    assert frozen is not None
    assert examples.texts is not None
    keys = {row: key for key, row in examples.texts._row_of.items()}
    values: dict[str, Tensor] = {}
    for name, value in vars(batch).items():
        if isinstance(value, CachedViews):
            places = [frozen.place(row) for row in value.rows]
            values[name] = torch.cat([pictures.views([image], draws, column) for image, column, draws in places])
        elif isinstance(value, CachedFeatures):
            values[name] = processor.pad([key_ids(keys[row]).tolist() for row in value.rows]).input_ids
    pictures.frozen = frozen
    return replace(batch, **values)
