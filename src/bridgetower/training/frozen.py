"""Frozen towers: their hidden states of every image and text are computed once and cached in the run's folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bridgetower.checkpoints.fingerprint import exact_fingerprint, fingerprint
from bridgetower.data.batch import TOKENS
from bridgetower.data.frozen import FrozenDataset, FrozenImages, FrozenTexts, key_ids, needed_texts
from bridgetower.data.prepared import PreparedImages
from bridgetower.distributed import rank, world_size
from bridgetower.files import require_space
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.layers import autocast
from bridgetower.model.presets import TEXT_TOWERS, VISION_TOWERS
from bridgetower.processor import Processor
from bridgetower.progress import step_bars
from bridgetower.rows import FILE_BYTES, RowFiles, claim_rows
from bridgetower.tasks.run_config import RunConfig
from bridgetower.training.loop import Fabric
from bridgetower.training.setup import TaskSetup

logger = logging.getLogger(__name__)

FOLDER = "towers"
_BATCH = 32  # images or texts at once


@torch.no_grad()
def frozen_examples(
    config: RunConfig, model: BridgeTower, setup: TaskSetup, out: Path, fabric: Fabric, *, progress: bool
) -> FrozenDataset:
    """Freezes the towers and caches their hidden states of all images and texts of a run; existing files are kept.

    From now on the images of the run come from the files, and so do the texts of the examples that are returned.

    Args:
        config: Of the run.
        model: Its towers do not change any more.
        setup: Its images and examples.
        out: Folder of the run; the files go to a folder in it.
        fabric: From `make_fabric`; the processes share the setup.
        progress: Show bars.

    Raises:
        ValueError: What is there was computed with other towers, data or settings.
        OSError: The disk has no room.
    """
    if config.init is None and {config.vision, config.text} & {None, *VISION_TOWERS, *TEXT_TOWERS}:
        logger.warning("freeze_towers keeps towers as they are, but some of them start from random weights; give init")
    model.vision.requires_grad_(False)
    model.text.requires_grad_(False)
    assert setup.images is not None  # RunConfig refuses freeze_towers where there are no prepared images
    folder, (train, held_out) = out / FOLDER, setup.images
    if rank() == 0:
        claim_rows(folder, _content(config, model, setup, train.processor))
    shown = progress and rank() == 0
    # Half precision is what the projections read under autocast; an evaluation is not under it. Nor are the views.
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    towers = _Towers(model.eval(), folder, fabric, config.data.num_workers, shown=shown)
    frozen = towers.images("train-images", train, config.frozen_views, config.seed, dtype)
    held_out.frozen = towers.images("validation-images", held_out, 1, config.seed, torch.float32)
    train.frozen = frozen
    plain = FrozenDataset(setup.examples, config.frozen_views, config.seed)
    texts = towers.texts("train-texts", needed_texts(plain), train.processor, dtype)
    model.train()
    return FrozenDataset(setup.examples, config.frozen_views, config.seed, texts)


@dataclass(frozen=True)
class _Towers:
    """Towers in evaluation mode, and where their outputs go."""

    model: BridgeTower
    folder: Path
    fabric: Fabric
    num_workers: int
    shown: bool

    def images(self, name: str, images: PreparedImages, num_views: int, seed: int, dtype: torch.dtype) -> FrozenImages:
        """Computes all views of some images."""
        config, columns = self.model.config, images.schema.image_columns
        shape = torch.Size((config.vision.num_tokens, len(config.vision_layers), config.vision.hidden_size))
        files = self._files(name, len(images) * num_views * len(columns), dtype.itemsize * shape.numel())
        frozen = FrozenImages(files=files, num_views=num_views, columns=columns, seed=seed)

        def compute(batches: list[range]) -> Iterator[Tensor]:
            views: Any = _Views(images, frozen)
            rows: list[Any] = batches
            for pixels in DataLoader(views, batch_sampler=rows, num_workers=self.num_workers):
                with self._precision(dtype):
                    layers = self.model.vision(pixels.to(self.fabric.device), config.vision_layers)
                yield from torch.stack(layers, dim=2).to(dtype)  # [B, P, K, V]

        self._fill(files, dtype.itemsize * shape.numel(), compute)
        return frozen

    def texts(self, name: str, keys: Sequence[bytes], processor: Processor, dtype: torch.dtype) -> FrozenTexts:
        """Computes some texts, which are sorted by length."""
        config, device, ids = self.model.config, self.fabric.device, [key_ids(key) for key in keys]
        row_bytes = dtype.itemsize * len(config.text_layers) * config.text.hidden_size * sum(map(len, ids)) // len(ids)
        files = self._files(name, len(keys), row_bytes)

        def compute(batches: list[range]) -> Iterator[Tensor]:
            for rows in batches:
                batch = processor.pad([ids[row].tolist() for row in rows])
                mask = None if batch.attention_mask is None else batch.attention_mask.bool().to(device)
                with self._precision(dtype):
                    layers = self.model.text(batch.input_ids.to(device), mask, config.text_layers)
                for row, tokens in zip(rows, torch.stack(layers, dim=2).to(dtype), strict=True):  # [B, L, K, T]
                    yield tokens[: len(ids[row])]

        self._fill(files, row_bytes, compute)
        return FrozenTexts(files, keys)

    def _precision(self, dtype: torch.dtype) -> torch.autocast:
        return autocast(self.fabric.device, "bf16" if dtype == torch.bfloat16 else "fp32")

    def _files(self, name: str, num_rows: int, row_bytes: int) -> RowFiles:
        return RowFiles(self.folder, name, num_rows=num_rows, rows_per_part=max(1, FILE_BYTES // row_bytes))

    def _fill(self, files: RowFiles, row_bytes: int, compute: Callable[[list[range]], Iterator[Tensor]]) -> None:
        """Writes the files that are missing; each process writes its share."""
        missing = files.missing()
        if rank() == 0:
            num_rows = sum(len(files.rows_of(number)) for number in missing)
            require_space(self.folder, num_rows * row_bytes, f"tower outputs {files.name}")
        self.fabric.barrier()  # from here on others write
        own = [files.rows_of(number) for number in missing[rank() :: world_size()]]
        outputs = compute([rows[start : start + _BATCH] for rows in own for start in range(0, len(rows), _BATCH)])
        with step_bars(shown=self.shown) as bars:
            bar = bars.add_task(f"towers: {files.name}", total=sum(map(len, own)), metrics="")
            for rows in own:
                tokens = []
                for output in islice(outputs, len(rows)):
                    tokens.append(output.clone())
                    bars.advance(bar)
                files.write(rows.start // files.rows_per_part, {TOKENS: tokens})
        self.fabric.barrier()


class _Views(Dataset[Tensor]):
    """Every view of a set's images, by its row."""

    def __init__(self, images: PreparedImages, frozen: FrozenImages) -> None:
        self.images, self.frozen = images, frozen

    def __getitem__(self, row: int) -> Float[Tensor, "3 h w"]:
        image, column, generator = self.frozen.place(row)
        pixels = self.images.views([image], generator, column)
        assert isinstance(pixels, Tensor)  # they are computed before the images are frozen
        return pixels[0]


def _content(config: RunConfig, model: BridgeTower, setup: TaskSetup, processor: Processor) -> dict[str, Any]:
    """What decides the files."""
    tensors = model.state_dict()
    towers = {name: tensors[name] for name in tensors if name.startswith(("vision.", "text."))}
    content = {
        "towers": exact_fingerprint(towers),
        "layers": [list(model.config.vision_layers), list(model.config.text_layers)],
        "preprocessing": fingerprint(model.config, {}, processor),
        "data": dict(setup.digests),
        "views": {"number": config.frozen_views, "seed": config.seed, "precision": config.precision},
        "settings": {"data": config.data, "task": config.task},
    }
    plain: dict[str, Any] = json.loads(json.dumps(content, default=asdict))
    return plain
