"""Frozen towers: their hidden states of every image and text are computed once, in a cache that runs share."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bridgetower.checkpoints.fingerprint import code_content, exact_fingerprint
from bridgetower.data.batch import derive_seed
from bridgetower.data.examples import NO_IMAGE, PreparedImages
from bridgetower.data.frozen import FeatureCache, Features, FrozenDataset, key_ids
from bridgetower.data.views import random_view
from bridgetower.distributed import rank
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import TextConfig, VisionConfig
from bridgetower.model.layers import autocast
from bridgetower.model.presets import TEXT_TOWERS, VISION_TOWERS
from bridgetower.model.towers import Tower
from bridgetower.processor import Processor, loaded
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.setup import TaskSetup

logger = logging.getLogger(__name__)

_BATCH = 32  # images or texts at once

_Run = Callable[..., Tensor]  # of a tower, on inputs and, for texts, their mask

# Settings of the data that do not change the pixels of an image; the processor has some of them.
_NOT_OF_PIXELS = (
    *("folders", "train_only", "repeats", "train_splits", "validation_split", "captions", "word_dropout", "max_length"),
    *("one_set_per_batch", "profile", "background", "fast_decode", "num_workers", "cache"),
)


@torch.no_grad()
def frozen_examples(
    config: RunConfig, model: BridgeTower, setup: TaskSetup, cache: FeatureCache, *, progress: bool
) -> FrozenDataset:
    """Freezes the towers and takes their hidden states of all images and texts from a cache, or computes them.

    From now on the images of the run come from the cache, and so do the texts of the examples that are returned. The
    towers do not change any more, and the cache is held open until the run ends.
    """
    if config.init is None and {config.vision, config.text} & {None, *VISION_TOWERS, *TEXT_TOWERS}:
        logger.warning("freeze_towers keeps towers as they are, but some of them start from random weights; give init")
    if not model.trained_top:
        model.vision.requires_grad_(False)
        model.text.requires_grad_(False)
    assert setup.images is not None  # RunConfig refuses freeze_towers where there are no prepared images
    train, *evaluated = setup.images
    # Half precision is what the projections read under autocast; an evaluation is not under it. Nor are the views.
    # Layers that train add to what is cached, so that it is not rounded.
    half = config.precision == "bf16" and not model.trained_top
    dtype = torch.bfloat16 if half else torch.float32
    shown = progress and rank() == 0
    model.eval()
    frozen = _images(cache, model, train, config.frozen_views, dtype, config, shown=shown)
    for held_out in evaluated:
        held_out.frozen = _images(cache, model, held_out, 1, torch.float32, config, shown=shown).first_views
    train.frozen = torch.tensor  # of their numbers
    examples = FrozenDataset(setup.examples, frozen, config.frozen_views, config.seed)
    keys = examples.needed_texts()
    features = _texts(cache, model, keys, train.processor, dtype, shown=shown)
    examples.texts = features, {key: row for row, key in enumerate(keys)}
    model.train()
    return examples


def _images(
    cache: FeatureCache,
    model: BridgeTower,
    images: PreparedImages,
    num_views: int,
    dtype: torch.dtype,
    config: RunConfig,
    *,
    shown: bool,
) -> Features:
    """Returns all views of some images, and of the image of examples without one if there are any."""

    def compute(rows: Sequence[int], tower: _Run) -> Iterator[Tensor]:
        batches = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
        view, workers = _View(images, num_views, config.seed), config.data.num_workers
        for pixels in loaded(view, batches, num_workers=workers, device=model.device):
            yield from tower(pixels)

    pixels, tokens = {"pixels": _pixels(images, num_views, config.seed)}, model.config.vision.num_tokens
    count = len(images) + bool((images.image_of == NO_IMAGE).any())
    options: dict[str, Any] = {"what": f"{len(images)} images", "shown": shown, "num_views": num_views}
    return _features(cache, model, "vision", dtype, pixels, count * num_views, tokens, compute, **options)


def _texts(
    cache: FeatureCache,
    model: BridgeTower,
    keys: Sequence[bytes],
    processor: Processor,
    dtype: torch.dtype,
    *,
    shown: bool,
) -> Features:
    """Returns some texts, which are sorted by length."""
    ids = [key_ids(key) for key in keys]

    def compute(rows: Sequence[int], tower: _Run) -> Iterator[Tensor]:
        for start in range(0, len(rows), _BATCH):
            numbers = rows[start : start + _BATCH]
            batch = processor.pad([ids[row].tolist() for row in numbers])
            mask = None if batch.attention_mask is None else batch.attention_mask.bool().to(model.device)
            states = tower(batch.input_ids, mask)
            yield from (row[:, : len(ids[number])] for number, row in zip(numbers, states, strict=True))

    digest = hashlib.sha256(b"".join(len(key).to_bytes(4, "big") + key for key in keys)).hexdigest()
    tokens = sum(map(len, ids)) / len(ids)
    options: dict[str, Any] = {"what": f"{len(keys)} texts", "shown": shown}
    return _features(cache, model, "text", dtype, {"texts": digest}, len(keys), tokens, compute, **options)


def _features(
    cache: FeatureCache,
    model: BridgeTower,
    part: Literal["vision", "text"],
    dtype: torch.dtype,
    inputs: Mapping[str, Any],
    num_rows: int,
    tokens: float,
    compute: Callable[[Sequence[int], _Run], Iterator[Tensor]],
    **options: Any,
) -> Features:
    """Returns what a tower makes of inputs; `compute` gives it the inputs of some rows."""
    tower: Tower = getattr(model, part)
    sizes: VisionConfig | TextConfig = getattr(model.config, part)
    layers = model.cached_layers(model.config.vision_layers if part == "vision" else model.config.text_layers)
    tensors = tower.state_dict(keep_vars=True)
    content = {  # all that decides the states
        "tower": json.loads(json.dumps(asdict(sizes))),
        "weights": exact_fingerprint({name: value for name, value in tensors.items() if not value.requires_grad}),
        "output": "states" if model.trained_top else "read",
        **code_content({type(module) for module in tower.modules()}),
        "layers": list(layers),
        "dtype": str(dtype),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "device": model.device.type,
        **inputs,
    }

    def run(given: Tensor, *mask: Tensor | None) -> Float[Tensor, "b k l w"]:
        given = given.to(model.device, non_blocking=True)
        with autocast(model.device, "bf16" if dtype == torch.bfloat16 else "fp32"):
            if model.trained_top:
                states = tower.states(given, mask[0] if mask else None, layers)
            else:
                states = tower(given, *mask, layers)
        return torch.stack(states, dim=1).to("cpu", dtype)

    shape: dict[str, Any] = {"num_layers": len(layers), "width": sizes.hidden_size, "dtype": dtype, **options}
    return cache.features(content, num_rows, tokens, lambda rows: compute(rows, run), **shape)


class _View:
    """A view of an image by its row; the row of the last image is that of none."""

    def __init__(self, images: PreparedImages, num_views: int, seed: int) -> None:
        self.images, self.num_views, self.seed = images, num_views, seed

    def __call__(self, row: int) -> Float[Tensor, "3 h w"]:
        image, view = divmod(row, self.num_views)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "view of an image", image, view))
        return self.images.views([image if image < len(self.images) else NO_IMAGE], generator)[0]


def _pixels(images: PreparedImages, num_views: int, seed: int) -> dict[str, Any]:
    """What decides the pixels of all views of some images; where the images lie does not."""
    processor = {name: value for name, value in asdict(images.processor.config).items() if name != "max_length"}
    views = {name: value for name, value in asdict(images.config).items() if name not in _NOT_OF_PIXELS}
    content = {
        "data": [[one.info.digest, one.splits] for one in images.sets],
        "images": len(images),
        "processor": processor,
        **code_content({type(images), random_view}, Path(inspect.getfile(Processor)).parent.glob("*.py"), {"PIL"}),
        "views": {"number": num_views, "seed": seed if images.config.varies_images else None, **views},
    }
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain
