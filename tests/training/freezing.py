"""Runs with frozen towers up to their examples, and the same examples for towers that are asked."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bridgetower.data.batch import CachedFeatures
from bridgetower.data.frozen import CachedViews, FrozenDataset, key_ids
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.towers import TextTower, VisionTower
from bridgetower.rows import RowCache
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.frozen import frozen_examples
from bridgetower.training.setup import TaskSetup, build_task
from bridgetower.training.start import starting_checkpoint


def prepared(config: RunConfig, cache: Path) -> tuple[BridgeTower, TaskSetup, FrozenDataset]:
    """Model, work and examples of a run as `train` makes them, with the features in a cache."""
    checkpoint = starting_checkpoint(config)
    model = checkpoint.model().train()
    if config.train_top is not None:
        model.train_top_layers(config.train_top)
    work = build_task(config, checkpoint, model)
    return model, work, frozen_examples(config, model, work, RowCache(cache, 2**40), progress=False)


@contextmanager
def tower_passes() -> Iterator[Counter[str]]:
    """Counts how often towers run, by kind."""
    passes: Counter[str] = Counter()

    def count(module: nn.Module, *_: object) -> None:
        if isinstance(module, VisionTower | TextTower):
            passes["vision" if isinstance(module, VisionTower) else "text"] += 1

    hook = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield passes
    finally:
        hook.remove()


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
            values[name] = torch.cat([pictures.views([image], draws) for image, draws in places])
        elif isinstance(value, CachedFeatures):
            values[name] = processor.pad([key_ids(keys[row]).tolist() for row in value.rows]).input_ids
    pictures.frozen = frozen
    return replace(batch, **values)
