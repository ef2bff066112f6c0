"""What trains and what watches: a loss that is a mean over rows, and runs with frozen towers up to their examples."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bridgetower.data.batches.batch import BatchKey
from bridgetower.data.batches.frozen import IMAGE_STATES
from bridgetower.model.towers import TextTower, VisionTower
from bridgetower.objectives.losses import Losses
from bridgetower.training.frozen import View, frozen_examples
from bridgetower.training.setup import build_task, starting_checkpoint
from bridgetower.training.trainer import Trainer
from helpers.sets import ENTRY_KINDS
from helpers.shapes import SHAPES_MODEL

KINDS = ("ranking", *ENTRY_KINDS)
PLAIN = SHAPES_MODEL.override({"text.dropout": 0.0, "fusion.dropout": 0.0})


class RowTask(nn.Module):
    """A loss that is a mean over rows, so that accumulated micro-batches are exactly one large batch."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.progress = 0.0
        self.seen = []

    def forward(self, batch):
        self.seen.append(self.progress)
        pooled = self.model(
            batch.pixel_values, batch.input_ids, batch.attention_mask, outputs="pooled"
        ).pooled
        loss = F.mse_loss(self.model.itm_logits(pooled)[:, 1], batch.image_index % 30 / 10)
        return Losses.weigh({"row": loss}, {"row": 1.0})


def run(context, out, **options):
    out.mkdir(exist_ok=True)
    Trainer(context, out, **{"resume": False, "progress": False} | options).run()
    return weights(context.model)


def weights(model):
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


@contextmanager
def recorded_gradients(model):
    seen = []

    def record(optimizer, arguments, options):
        seen.append(
            torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])
        )

    hook = register_optimizer_step_pre_hook(record)
    try:
        yield seen
    finally:
        hook.remove()


KEY = BatchKey(tuple(range(6)), 3)
"""Of a batch for `recomputed`."""


def prepared(config, cache):
    checkpoint = starting_checkpoint(config)
    model = checkpoint.model().train()
    if config.train_top is not None:
        model.train_top_layers(config.train_top)
    context = build_task(config, checkpoint, model)
    return replace(context, examples=frozen_examples(context, cache, progress=False))


@contextmanager
def tower_passes():
    passes = Counter()

    def count(module, *_):
        if isinstance(module, VisionTower | TextTower):
            passes["vision" if isinstance(module, VisionTower) else "text"] += 1

    hook = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield passes
    finally:
        hook.remove()


def passes_of(config, cache):
    with tower_passes() as passes:
        prepared(config, cache)
    return passes


def recomputed(batch, run):
    """The same batch of `KEY` with pixels in the place of hidden states, of the views that have these."""
    examples = run.examples
    images = run.images[0]
    features = examples.image_features
    batch_of_images = examples.examples[replace(KEY, seed=0)]
    values = {name: None for name in ("text_states", "masked_states") if hasattr(batch, name)}
    read_features = images.read_features
    images.read_features = None
    view = View(images, features.num_views, examples.seed)
    for name in IMAGE_STATES:
        if (numbers := getattr(batch_of_images, name)) is not None:
            pixels = []
            for number, states in zip(numbers.tolist(), getattr(batch, name), strict=True):
                rows = range(number * features.num_views, (number + 1) * features.num_views)
                seen = [
                    row
                    for row, cached_states in zip(rows, features.read(rows), strict=True)
                    if torch.equal(cached_states, states)
                ]
                pixels.append(view(seen[0]))
            values |= {
                name: None,
                name.replace("image_states", "pixel_values"): torch.stack(pixels),
            }
    images.read_features = read_features
    return replace(batch, **values)
