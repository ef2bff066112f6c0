"""Frozen towers, run once for each image and text, and projections that are aligned on what they made."""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bridgetower.checkpoints.checkpoint import code_content, exact_fingerprint
from bridgetower.data.batches.batch import CaptionBatch, StepSampler, derive_seed
from bridgetower.data.batches.examples import NO_IMAGE, PreparedImages
from bridgetower.data.batches.frozen import FeatureCache, FrozenDataset, FrozenFeatures, key_ids
from bridgetower.data.batches.views import random_view
from bridgetower.distributed import rank
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.config import TextConfig, VisionConfig
from bridgetower.model.fusion import Encoded
from bridgetower.model.layers import autocast, mean_token, to_device
from bridgetower.model.presets import TEXT_TOWERS, VISION_TOWERS
from bridgetower.model.towers import Tower
from bridgetower.objectives.losses import info_nce
from bridgetower.processor import Processor, load_items, loaded
from bridgetower.progress import step_bars
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.setup import TrainContext

logger = logging.getLogger(__name__)

LR = 1e-2
"""Of AdamW at the first step of aligning; it falls linearly to 0. Nothing else is trained, so nothing is upset."""

_BATCH = 32  # images or texts at once

# Settings of the data that do not change the pixels of an image; the processor has some of them.
_NOT_OF_PIXELS = (
    *(
        "folders",
        "train_only",
        "repeats",
        "train_splits",
        "validation_split",
        "captions",
        "word_dropout",
        "max_length",
    ),
    *("one_set_per_batch", "profile", "background", "fast_decode", "num_workers", "cache"),
)


@torch.no_grad()
def frozen_examples(context: TrainContext, cache: FeatureCache, *, progress: bool) -> FrozenDataset:
    """Freezes the towers; what they make of images and texts then comes from the cache, which it fills and holds."""
    config, model = context.config, context.model
    if config.init is None and {config.vision, config.text} & {None, *VISION_TOWERS, *TEXT_TOWERS}:
        logger.warning(
            "freeze_towers keeps towers as they are, but some of them start from random weights; give init"
        )
    if not model.trained_top:
        model.vision.requires_grad_(False)
        model.text.requires_grad_(False)
    train, *evaluated = context.images
    # Half precision is what the projections read under autocast; an evaluation is not under it. Nor are the views.
    # Layers that train add to what is cached, so that it is not rounded.
    half = config.precision == "bf16" and not model.trained_top
    dtype = torch.bfloat16 if half else torch.float32
    pooled = not (getattr(context.task, "fuses", True) or model.trained_top or config.align_first)
    towers = _Towers(model, cache, config, shown=progress and rank() == 0)
    model.eval()
    frozen = towers.images(train, config.frozen_views, dtype, pooled)
    for held_out in evaluated:
        held_out.frozen = towers.images(held_out, 1, torch.float32).read
    train.frozen = torch.tensor  # of their numbers
    examples = FrozenDataset(context.examples, frozen, config.frozen_views, config.seed)
    with train.held():
        keys = examples.needed_texts()
    examples.texts = (
        towers.texts(keys, train.processor, dtype, pooled),
        {key: row for row, key in enumerate(keys)},
    )
    model.train()
    return examples


class _Towers:
    """Frozen towers, with what they made before in a cache."""

    def __init__(
        self, model: BridgeTower, cache: FeatureCache, config: RunConfig, *, shown: bool
    ) -> None:
        self.model, self.cache, self.config, self.shown = model, cache, config, shown

    def images(
        self, images: PreparedImages, num_views: int, dtype: torch.dtype, pooled: bool = False
    ) -> FrozenFeatures:
        """Returns all views of some images, and of the image of examples without one if there are any."""
        model, seed = self.model, self.config.seed
        processor = {
            name: value
            for name, value in asdict(images.processor.config).items()
            if name != "max_length"
        }
        views = {
            name: value
            for name, value in asdict(images.config).items()
            if name not in _NOT_OF_PIXELS
        }
        pixels = {  # all that decides the pixels of all views; where the images lie does not
            "data": [[one.info.digest, one.splits] for one in images.sets],
            "images": len(images),
            "processor": processor,
            **code_content(
                {type(images), random_view},
                Path(inspect.getfile(Processor)).parent.glob("*.py"),
                {"PIL"},
            ),
            "views": {
                "number": num_views,
                "seed": seed if images.config.varies_images else None,
                **views,
            },
        }

        def compute(rows: Sequence[int], tower: Callable[..., Tensor]) -> Iterator[Tensor]:
            batches = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
            view, workers = View(images, num_views, seed), self.config.data.num_workers
            for batch in loaded(view, batches, num_workers=workers, device=model.device):
                yield from tower(batch)

        rows = (len(images) + bool((images.image_of == NO_IMAGE).any())) * num_views
        tokens, what = model.config.vision.num_tokens, f"{len(images)} images"
        inputs = {"pixels": pixels, "pooling": pooled and model.config.heads.image_pooling}
        encode = model.encode_image if pooled else None
        return self._features(
            "vision", dtype, inputs, rows, tokens, compute, encode, what=what, num_views=num_views
        )

    def texts(
        self, keys: Sequence[bytes], processor: Processor, dtype: torch.dtype, pooled: bool
    ) -> FrozenFeatures:
        """Returns some texts, which are sorted by length."""
        ids = [key_ids(key) for key in keys]

        def compute(rows: Sequence[int], tower: Callable[..., Tensor]) -> Iterator[Tensor]:
            for start in range(0, len(rows), _BATCH):
                numbers = rows[start : start + _BATCH]
                batch = processor.pad([ids[row].tolist() for row in numbers])
                mask = None if batch.attention_mask is None else batch.attention_mask.bool()
                states = tower(batch.input_ids, mask)
                yield from (
                    row[:, : len(ids[number])] for number, row in zip(numbers, states, strict=True)
                )

        digest = hashlib.sha256(
            b"".join(len(key).to_bytes(4, "big") + key for key in keys)
        ).hexdigest()
        tokens, what = sum(map(len, ids)) / len(ids), f"{len(keys)} texts"
        inputs = {"texts": digest, "pooling": pooled and self.model.config.heads.text_pooling}
        encode = self.model.encode_text if pooled else None
        return self._features("text", dtype, inputs, len(keys), tokens, compute, encode, what=what)

    def _features(
        self,
        part: Literal["vision", "text"],
        dtype: torch.dtype,
        inputs: Mapping[str, Any],
        num_rows: int,
        tokens: float,
        compute: Callable[[Sequence[int], Callable[..., Tensor]], Iterator[Tensor]],
        encode: Callable[..., Encoded] | None,
        **options: Any,
    ) -> FrozenFeatures:
        """Returns what a tower makes of inputs, or their vectors by `encode`; `compute` gives it those of some rows."""
        model = self.model
        tower: Tower = getattr(model, part)
        sizes: VisionConfig | TextConfig = getattr(model.config, part)
        read = model.config.vision_layers if part == "vision" else model.config.text_layers
        layers = read[-1:] if encode else model.cached_layers(read)
        weights = {
            name: value
            for name, value in tower.state_dict(keep_vars=True).items()
            if not value.requires_grad
        }
        content = {  # all that decides the states
            "tower": asdict(sizes),
            "weights": exact_fingerprint(weights),
            "output": "states" if model.trained_top else "read",
            **code_content({type(module) for module in tower.modules()}),
            "layers": layers,
            "dtype": str(dtype),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "device": model.device.type,
            **inputs,
        }

        def run(given: Tensor, *mask: Tensor | None) -> Float[Tensor, "b k l w"]:
            given = to_device(given, model.device)
            mask = tuple(each if each is None else to_device(each, model.device) for each in mask)
            with autocast(model.device, "bf16" if dtype == torch.bfloat16 else "fp32"):
                if encode:
                    states = [encode(given, *mask, outputs="cls").cls[:, None]]
                elif model.trained_top:
                    states = tower.states(given, mask[0] if mask else None, layers)
                else:
                    states = tower(given, *mask, layers)
            return torch.stack(states, dim=1).to("cpu", dtype)

        options |= {
            "num_layers": len(layers),
            "width": sizes.hidden_size,
            "dtype": dtype,
            "pooled": bool(encode),
        }
        tokens = 1 if encode else tokens
        return self.cache.features(
            content, num_rows, tokens, lambda rows: compute(rows, run), shown=self.shown, **options
        )


class View:
    """A view of an image by its row; the row of the last image is that of none."""

    def __init__(self, images: PreparedImages, num_views: int, seed: int) -> None:
        self.images, self.num_views, self.seed = images, num_views, seed

    def __call__(self, row: int) -> Float[Tensor, "3 h w"]:
        image, view = divmod(row, self.num_views)
        generator = torch.Generator().manual_seed(
            derive_seed(self.seed, "view of an image", image, view)
        )
        return self.images.views([image if image < len(self.images) else NO_IMAGE], generator)[0]


class Alignment(nn.Module):
    """ITC of means of the projected tokens, in each bridged layer; its temperature is learnt as that of the head."""

    def __init__(self, model: BridgeTower) -> None:
        super().__init__()
        self.model = model
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, batch: CaptionBatch) -> Float[Tensor, ""]:
        """Returns the mean of the contrastive losses of all bridged layers."""
        images = self.model.encode_image(batch.pixel_values, states=batch.image_states)
        texts = self.model.encode_text(
            batch.input_ids, batch.attention_mask, states=batch.text_states
        )
        losses = []
        index, scale = batch.image_index, self.log_scale.exp()
        for image, text in zip(images.layers, texts.layers, strict=True):
            means = mean_token(image, images.mask), mean_token(text, texts.mask)
            features = F.normalize(means[0], dim=-1), F.normalize(means[1], dim=-1)
            losses.append(info_nce(features, index, features, index, logit_scale=scale))
        return torch.stack(losses).mean()


def align_projections(context: TrainContext, *, progress: bool) -> None:
    """Trains the projections alone, by ITC; a run that was killed before its first state does the same again."""
    config, model, examples = context.config, context.model, context.examples
    task = (
        Alignment(model).to(model.device).eval()
    )  # layers of the towers that run here draw no dropout
    projections = nn.ModuleList([model.image_projections, model.text_projections])
    parameters, steps = [task.log_scale, *projections.parameters()], config.align_first
    optimizer, seed = (
        torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0),
        derive_seed(config.seed, "alignment"),
    )
    sampler = StepSampler(
        len(examples), batch_size=config.batch_size, micro_batches=1, steps=range(steps), seed=seed
    )
    batches = load_items(
        examples.__getitem__, sampler, num_workers=config.data.num_workers, device=model.device
    )
    losses: list[float] = []
    with step_bars(enabled=progress and rank() == 0) as bars:
        bar = bars.add_task("aligning projections", total=steps, metrics="")
        for step, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = LR * (1 - step / steps)
            with autocast(model.device, config.precision):
                loss: Tensor = task(batch.to(model.device))
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"loss of aligning is {losses[-1]} at step {step + 1}; leave out align_first"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward(inputs=parameters)
            optimizer.step()
            bars.update(bar, advance=1, metrics=f"itc {losses[-1]:.3f}")
    optimizer.zero_grad(set_to_none=True)
    model.train()
    logger.info(
        "projections aligned in %d steps: ITC from %.3f to %.3f", steps, losses[0], losses[-1]
    )
