"""Features of frozen towers, computed once for each image and text, and the alignment of projections on them."""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bridgetower.checkpoints.checkpoint import code_content, exact_fingerprint
from bridgetower.data.batches.batch import CaptionBatch, StepSampler, derive_seed
from bridgetower.data.batches.examples import NO_IMAGE, PreparedImages
from bridgetower.data.batches.frozen import FrozenDataset, FrozenFeatures, cached_features, key_ids
from bridgetower.data.batches.views import random_view
from bridgetower.distributed import rank
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.layers import autocast, mean_token, to_device
from bridgetower.model.presets import TEXT_TOWERS, VISION_TOWERS
from bridgetower.objectives.losses import info_nce
from bridgetower.processor import Processor, load_items, loaded
from bridgetower.progress import step_bars
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.setup import TrainContext

logger = logging.getLogger(__name__)

LR = 1e-2
"""Learning rate of AdamW at the first step of aligning, which falls linearly to 0. Only the projections are trained."""

_BATCH = 32  # images or texts
# Bytes of hidden states up to which they are stored also where vectors are enough, for a later run that reads them.
_MAX_STATES = 2**31

_Modality = Literal["vision", "text"]
_Inputs = tuple[Tensor, Tensor | None, Sequence[int | None]]
"""Pixels or token ids, a mask, and the numbers of tokens to keep of each row, None for all."""

# Settings of the data that do not change the pixels of an image; the processor has some of them.
_NOT_OF_PIXELS = {
    "folders",
    "train_only",
    "repeats",
    "train_splits",
    "validation_split",
    "captions",
    "word_dropout",
    "max_length",
    "one_set_per_batch",
    "profile",
    "background",
    "fast_decode",
    "num_workers",
    "cache",
}


@torch.no_grad()
def frozen_examples(context: TrainContext, cache: Path, *, progress: bool) -> FrozenDataset:
    """Freezes the towers and returns the examples with their features, from a cache that this fills."""
    config = context.config
    model = context.model
    if config.init is None and {config.vision, config.text} & {None, *VISION_TOWERS, *TEXT_TOWERS}:
        logger.warning(
            "freeze_towers keeps towers as they are, but some of them start from random weights; give init"
        )
    if not model.trained_top:
        model.vision.requires_grad_(False)
        model.text.requires_grad_(False)

    # Projections read half precision under autocast, which evaluations do without. Layers that train add to cached
    # states, which are not rounded then.
    is_half = config.precision == "bf16" and not model.trained_top
    dtype = torch.bfloat16 if is_half else torch.float32
    pools = not (getattr(context.task, "fuses", True) or model.trained_top or config.align_first)
    towers = _Towers(model, cache, config, progress=progress and rank() == 0)
    model.eval()
    train_images, *evaluated_images = context.images
    features = towers.image_features(train_images, config.frozen_views, dtype, pools=pools)
    for images in evaluated_images:
        evaluated_features = towers.image_features(images, 1, torch.float32, pools=False)
        images.read_features = evaluated_features.read
    examples = FrozenDataset(context.examples, train_images, features, config.seed)
    keys = examples.needed_texts()
    text_features = towers.text_features(keys, train_images.processor, dtype, pools=pools)
    examples.use_text_features(keys, text_features)
    model.train()
    return examples


class _Towers:
    """Frozen towers with a cache of their features."""

    def __init__(
        self, model: BridgeTower, cache: Path, config: RunConfig, *, progress: bool
    ) -> None:
        self.model = model
        self.cache = cache
        self.config = config
        self.progress = progress

    def image_features(
        self, images: PreparedImages, num_views: int, dtype: torch.dtype, *, pools: bool
    ) -> FrozenFeatures:
        """Returns features of all views of images, and of the blank image if examples have none."""
        seed = self.config.seed
        processor = asdict(images.processor.config)
        del processor["max_length"]
        settings = asdict(images.config)
        # All that decides the pixels of all views; the folder of a set does not.
        pixels = {
            "data": [[prepared.info.digest, prepared.splits] for prepared in images.sets],
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
                **{name: settings[name] for name in settings if name not in _NOT_OF_PIXELS},
            },
        }

        def batches(rows: Sequence[int]) -> Iterator[_Inputs]:
            view = View(images, num_views, seed)
            items = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
            workers = self.config.data.num_workers
            for batch in loaded(view, items, num_workers=workers, device=self.model.device):
                yield batch, None, [None] * len(batch)

        has_blank = bool((images.image_of == NO_IMAGE).any())
        return self._features(
            "vision",
            {"pixels": pixels},
            batches,
            (len(images) + has_blank) * num_views,
            self.model.config.vision.num_tokens,
            dtype,
            pools=pools,
            description=f"{len(images)} images",
            num_views=num_views,
        )

    def text_features(
        self, keys: Sequence[bytes], processor: Processor, dtype: torch.dtype, *, pools: bool
    ) -> FrozenFeatures:
        """Returns features of texts, which are sorted by length."""
        ids = [key_ids(key) for key in keys]

        def batches(rows: Sequence[int]) -> Iterator[_Inputs]:
            for start in range(0, len(rows), _BATCH):
                texts = [ids[row].tolist() for row in rows[start : start + _BATCH]]
                batch = processor.pad(texts)
                mask = None if batch.attention_mask is None else batch.attention_mask.bool()
                yield batch.input_ids, mask, list(map(len, texts))

        content = b"".join(len(key).to_bytes(4, "big") + key for key in keys)
        return self._features(
            "text",
            {"texts": hashlib.sha256(content).hexdigest()},
            batches,
            len(keys),
            sum(map(len, ids)) / len(ids),
            dtype,
            pools=pools,
            description=f"{len(keys)} texts",
        )

    def _features(
        self,
        modality: _Modality,
        inputs: Mapping[str, Any],
        batches: Callable[[Sequence[int]], Iterator[_Inputs]],
        num_rows: int,
        num_tokens: float,
        dtype: torch.dtype,
        *,
        pools: bool,
        **options: Any,
    ) -> FrozenFeatures:
        """Returns hidden states of a tower, or pooled vectors, for inputs that `batches` makes from rows."""
        model = self.model
        tower: Any = getattr(model, modality)
        width = getattr(model.config, modality).hidden_size
        read_layers = getattr(model.config, f"{modality}_layers")
        layers = model.cached_layers(read_layers)
        row_bytes = num_tokens * len(layers) * width * dtype.itemsize
        stores_vectors = pools and num_rows * row_bytes > _MAX_STATES
        if stores_vectors:
            layers = read_layers[-1:]
        content = {**self._content(modality, dtype), "layers": layers, **inputs}
        if stores_vectors:
            heads = model.config.heads
            content["pooling"] = (heads.image_pooling, heads.text_pooling)

        def run(values: Tensor, mask: Tensor | None) -> Float[Tensor, "b k l w"]:
            values = to_device(values, model.device)
            if mask is not None:
                mask = to_device(mask, model.device)
            with autocast(model.device, "bf16" if dtype == torch.bfloat16 else "fp32"):
                if stores_vectors:
                    states = [self._vectors(modality, values, mask)[:, None]]
                elif model.trained_top:
                    states = tower.states(values, mask, layers)
                else:
                    states = tower.run(values, mask, layers)
            return torch.stack(states, dim=1).to("cpu", dtype)

        def compute(rows: Sequence[int]) -> Iterator[Float[Tensor, "k l w"]]:
            for values, mask, lengths in batches(rows):
                for states, length in zip(run(values, mask), lengths, strict=True):
                    yield states[:, :length]

        features = cached_features(
            self.cache,
            content,
            num_rows,
            1 if stores_vectors else num_tokens,
            compute,
            num_layers=len(layers),
            width=width,
            dtype=dtype,
            progress=self.progress,
            **options,
        )
        if stores_vectors:
            states, _ = features.read_states(range(num_rows))
            return replace(features, vectors=states[:, 0, 0])
        return self._with_vectors(features, modality, num_rows) if pools else features

    def _content(self, modality: _Modality, dtype: torch.dtype) -> dict[str, Any]:
        """Returns all that decides what the tower gives for an input."""
        model = self.model
        tower: nn.Module = getattr(model, modality)
        weights = {
            name: value
            for name, value in tower.state_dict(keep_vars=True).items()
            if not value.requires_grad
        }
        return {
            "tower": asdict(getattr(model.config, modality)),
            "weights": exact_fingerprint(weights),
            "output": "states" if model.trained_top else "read",
            **code_content({type(module) for module in tower.modules()}),
            "dtype": str(dtype),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "device": model.device.type,
        }

    def _with_vectors(
        self, features: FrozenFeatures, modality: _Modality, num_rows: int
    ) -> FrozenFeatures:
        vectors = []
        for start in range(0, num_rows, _BATCH):
            states, mask = features.read_states(range(start, min(start + _BATCH, num_rows)))
            vectors.append(self._vectors(modality, mask, mask, states))
        return replace(features, vectors=torch.cat(vectors))

    def _vectors(
        self,
        modality: _Modality,
        values: Tensor,
        mask: Tensor | None,
        states: Float[Tensor, "b k l w"] | None = None,
    ) -> Float[Tensor, "b w"]:
        """Returns the global vectors of inputs, or of hidden states."""
        if modality == "text":
            return self.model.encode_text(values, mask, outputs="cls", states=states).cls
        pixel_values = values if states is None else None
        return self.model.encode_image(pixel_values, outputs="cls", states=states).cls


class View:
    """A view of an image by its row. The rows after the last image are of a blank one."""

    def __init__(self, images: PreparedImages, num_views: int, seed: int) -> None:
        self.images = images
        self.num_views = num_views
        self.seed = seed

    def __call__(self, row: int) -> Float[Tensor, "3 h w"]:
        image, view = divmod(row, self.num_views)
        seed = derive_seed(self.seed, "view of an image", image, view)
        generator = torch.Generator().manual_seed(seed)
        return self.images.views([image if image < len(self.images) else NO_IMAGE], generator)[0]


class Alignment(nn.Module):
    """ITC between means of the projected tokens of each bridged layer, with a temperature that is learnt."""

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
        index = batch.image_index
        losses = []
        for image_tokens, text_tokens in zip(images.layers, texts.layers, strict=True):
            embeds = (
                F.normalize(mean_token(image_tokens, images.mask), dim=-1),
                F.normalize(mean_token(text_tokens, texts.mask), dim=-1),
            )
            scale = self.log_scale.exp()
            losses.append(info_nce(embeds, index, embeds, index, logit_scale=scale))
        return torch.stack(losses).mean()


def align_projections(context: TrainContext, *, progress: bool) -> None:
    """Trains the projections alone, by ITC. A run that is killed before its first state repeats it."""
    config = context.config
    model = context.model
    steps = config.align_first
    # In evaluation mode, layers of the towers that run here draw no dropout.
    task = Alignment(model).to(model.device).eval()
    projections = nn.ModuleList([model.image_projections, model.text_projections])
    parameters = [task.log_scale, *projections.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    sampler = StepSampler(
        len(context.examples),
        batch_size=config.batch_size,
        micro_batches=1,
        steps=range(steps),
        seed=derive_seed(config.seed, "alignment"),
    )
    batches = load_items(
        context.examples.__getitem__,
        sampler,
        num_workers=config.data.num_workers,
        device=model.device,
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
