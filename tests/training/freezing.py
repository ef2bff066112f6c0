"""Runs with frozen towers up to their examples, and the same examples for towers that are asked."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bridgetower.data.batch import BatchKey
from bridgetower.data.frozen import IMAGE_STATES, FeatureCache
from bridgetower.model.towers import TextTower, VisionTower
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.frozen import View, frozen_examples
from bridgetower.training.setup import TrainContext, build_task, starting_checkpoint

KEY = BatchKey(tuple(range(6)), 3)
"""Of a batch for `recomputed`."""


def prepared(config: RunConfig, cache: Path) -> TrainContext:
    """A run as `train` makes it, with the features of its examples in a cache."""
    checkpoint = starting_checkpoint(config)
    model = checkpoint.model().train()
    if config.train_top is not None:
        model.train_top_layers(config.train_top)
    context = build_task(config, checkpoint, model)
    return replace(context, examples=frozen_examples(context, FeatureCache(cache, 2**40), progress=False))


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


def passes_of(config: RunConfig, cache: Path) -> Counter[str]:
    """How often towers run in a run up to its examples."""
    with tower_passes() as passes:
        prepared(config, cache)
    return passes


def recomputed(batch: Any, run: TrainContext) -> Any:
    """The same batch of `KEY` with pixels in the place of hidden states, of the views that have these."""
    examples: Any = run.examples
    images, features = run.images[0], examples.images
    shown = examples.examples[replace(KEY, seed=0)]
    values: dict[str, Any] = {name: None for name in ("text_states", "masked_states") if hasattr(batch, name)}
    frozen, images.frozen = images.frozen, None
    view = View(images, features.num_views, examples.seed)
    for name in IMAGE_STATES:
        if (numbers := getattr(shown, name)) is not None:
            pixels = []
            for number, states in zip(numbers.tolist(), getattr(batch, name), strict=True):
                rows = range(number * features.num_views, (number + 1) * features.num_views)
                seen = [row for row, known in zip(rows, features.read(rows), strict=True) if torch.equal(known, states)]
                pixels.append(view(seen[0]))
            values |= {name: None, name.replace("image_states", "pixel_values"): torch.stack(pixels)}
    images.frozen = frozen
    return replace(batch, **values)
