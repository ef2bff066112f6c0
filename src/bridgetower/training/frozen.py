"""Frozen towers: their hidden states of every image and text are computed once, in a cache that runs share."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bridgetower.checkpoints.fingerprint import code_content, exact_fingerprint
from bridgetower.data.batch import TOKENS
from bridgetower.data.frozen import FrozenDataset, FrozenImages, FrozenTexts, key_ids, needed_texts
from bridgetower.data.prepared import PreparedImages
from bridgetower.data.views import random_view
from bridgetower.distributed import barrier, from_first, rank, world_size
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.layers import autocast
from bridgetower.model.presets import TEXT_TOWERS, VISION_TOWERS
from bridgetower.model.tower_config import TextConfig, VisionConfig
from bridgetower.processor import Processor, loaded
from bridgetower.progress import step_bars
from bridgetower.rows import RowCache, RowFiles
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.setup import TaskSetup

logger = logging.getLogger(__name__)

_BATCH = 32  # images or texts at once

# Settings of the data that do not change the pixels of an image; the processor has some of them.
_NOT_OF_PIXELS = (
    *("folders", "train_only", "repeats", "train_splits", "validation_split", "captions", "word_dropout", "max_length"),
    *("one_set_per_batch", "profile", "background", "fast_decode", "num_workers", "cache"),
)


@torch.no_grad()
def frozen_examples(
    config: RunConfig, model: BridgeTower, setup: TaskSetup, cache: RowCache, *, progress: bool
) -> FrozenDataset:
    """Freezes the towers and takes their hidden states of all images and texts from a cache, or computes them.

    From now on the images of the run come from the cache, and so do the texts of the examples that are returned.

    Args:
        config: Of the run.
        model: Its towers do not change any more.
        setup: Its images and examples.
        cache: Is held open until the run ends.
        progress: Show bars.

    Raises:
        OSError: The disk has no room.
    """
    if config.init is None and {config.vision, config.text} & {None, *VISION_TOWERS, *TEXT_TOWERS}:
        logger.warning("freeze_towers keeps towers as they are, but some of them start from random weights; give init")
    if not model.trained_top:
        model.vision.requires_grad_(False)
        model.text.requires_grad_(False)
    assert setup.images is not None  # RunConfig refuses freeze_towers where there are no prepared images
    train, *evaluated = setup.images
    shown = progress and rank() == 0
    # Half precision is what the projections read under autocast; an evaluation is not under it. Nor are the views.
    # Layers that train add to what is cached, so that it is not rounded.
    half = config.precision == "bf16" and not model.trained_top
    dtype = torch.bfloat16 if half else torch.float32
    towers = _Towers(model.eval(), cache, config.data.num_workers, shown=shown)
    frozen = towers.images(train, config.frozen_views, config.seed, dtype)
    for held_out in evaluated:
        held_out.frozen = towers.images(held_out, 1, config.seed, torch.float32)
    train.frozen = frozen
    plain = FrozenDataset(setup.examples, config.frozen_views, config.seed)
    texts = towers.texts(needed_texts(plain), train.processor, dtype)
    model.train()
    return FrozenDataset(setup.examples, config.frozen_views, config.seed, texts)


@dataclass(frozen=True)
class _Towers:
    """Towers in evaluation mode, and where their outputs go."""

    model: BridgeTower
    cache: RowCache
    num_workers: int
    shown: bool

    def images(self, images: PreparedImages, num_views: int, seed: int, dtype: torch.dtype) -> FrozenImages:
        """Computes all views of some images that are not in the cache."""
        config, tower = self.model.config, self.model.vision
        cached = self.model.cached_layers(config.vision_layers)
        content = self._content(tower, config.vision, cached, dtype)
        content["pixels"] = _pixels(images, num_views, seed)
        shape = torch.Size((config.vision.num_tokens, len(cached), config.vision.hidden_size))
        row_bytes = dtype.itemsize * shape.numel()
        files = self.cache.files(content, len(images) * num_views, row_bytes)
        frozen = FrozenImages(files=files, num_views=num_views, seed=seed)

        def compute(batches: list[range]) -> Iterator[Tensor]:
            device = self.model.device
            for pixels in loaded(_Views(images, frozen), batches, num_workers=self.num_workers, device=device):
                pixels = pixels.to(device, non_blocking=True)
                with self._precision(dtype):
                    layers = tower.states(pixels, None, cached) if self.model.trained_top else tower(pixels, cached)
                yield from torch.stack(layers, dim=2).to(dtype)  # [B, P, K, V]

        self._fill(files, content, row_bytes, f"{len(images)} images", compute)
        return frozen

    def texts(self, keys: Sequence[bytes], processor: Processor, dtype: torch.dtype) -> FrozenTexts:
        """Computes some texts, which are sorted by length, if they are not in the cache."""
        config, device, ids = self.model.config, self.model.device, [key_ids(key) for key in keys]
        cached = self.model.cached_layers(config.text_layers)
        run = self.model.text.states if self.model.trained_top else self.model.text
        row_bytes = dtype.itemsize * len(cached) * config.text.hidden_size * sum(map(len, ids)) // len(ids)
        content = self._content(self.model.text, config.text, cached, dtype)
        content["texts"] = hashlib.sha256(b"".join(len(key).to_bytes(4, "big") + key for key in keys)).hexdigest()
        files = self.cache.files(content, len(keys), row_bytes)

        def compute(batches: list[range]) -> Iterator[Tensor]:
            for rows in batches:
                batch = processor.pad([ids[row].tolist() for row in rows])
                mask = None if batch.attention_mask is None else batch.attention_mask.bool().to(device)
                with self._precision(dtype):
                    layers = run(batch.input_ids.to(device), mask, cached)
                for row, tokens in zip(rows, torch.stack(layers, dim=2).to(dtype), strict=True):  # [B, L, K, T]
                    yield tokens[: len(ids[row])]

        self._fill(files, content, row_bytes, f"{len(keys)} texts", compute)
        return FrozenTexts(files, keys)

    def _precision(self, dtype: torch.dtype) -> AbstractContextManager[object]:
        return autocast(self.model.device, "bf16" if dtype == torch.bfloat16 else "fp32")

    def _content(
        self, tower: nn.Module, config: VisionConfig | TextConfig, layers: tuple[int, ...], dtype: torch.dtype
    ) -> dict[str, Any]:
        """What decides the outputs of a tower, beside its inputs."""
        tensors = tower.state_dict(keep_vars=True)
        frozen = {name: tensor for name, tensor in tensors.items() if not tensor.requires_grad}
        return {
            "tower": json.loads(json.dumps(asdict(config))),
            "weights": exact_fingerprint(frozen),
            "output": "states" if self.model.trained_top else "read",
            **code_content({type(module) for module in tower.modules()}),
            "layers": list(layers),
            "dtype": str(dtype),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "device": self.model.device.type,
        }

    def _fill(
        self,
        files: RowFiles,
        content: Mapping[str, Any],
        row_bytes: int,
        what: str,
        compute: Callable[[list[range]], Iterator[Tensor]],
    ) -> None:
        """Writes the files that are missing; each process writes its share."""
        while missing := from_first(self.cache.claim(files, content, row_bytes) if rank() == 0 else []):
            own = [files.rows_of(number) for number in missing[rank() :: world_size()]]
            outputs = compute([rows[start : start + _BATCH] for rows in own for start in range(0, len(rows), _BATCH)])
            with step_bars(shown=self.shown) as bars:
                bar = bars.add_task(f"towers: {what}", total=sum(map(len, own)), metrics="")
                for rows in own:
                    tokens = []
                    for output in islice(outputs, len(rows)):
                        tokens.append(output.clone())
                        bars.advance(bar)
                    files.write(rows.start // files.rows_per_part, {TOKENS: tokens})
            barrier()


class _Views:
    """Every view of a set's images, by its row."""

    def __init__(self, images: PreparedImages, frozen: FrozenImages) -> None:
        self.images, self.frozen = images, frozen

    def __call__(self, row: int) -> Float[Tensor, "3 h w"]:
        image, generator = self.frozen.place(row)
        pixels = self.images.views([image], generator)
        assert isinstance(pixels, Tensor)  # they are computed before the images are frozen
        return pixels[0]


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
