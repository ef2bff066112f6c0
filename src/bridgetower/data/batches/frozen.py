"""Features of frozen towers: tables that runs share, and a dataset that has them in place of pixels."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from bridgetower.data.batches.batch import Batch, BatchDataset, BatchKey, derive_seed, joined
from bridgetower.data.batches.examples import PreparedImages
from bridgetower.data.sets.store import Table
from bridgetower.distributed import barrier, broadcast_object, rank, world_size
from bridgetower.files import (
    json_text,
    locked,
    require_space,
    write_bytes,
)
from bridgetower.progress import counted

IMAGE_STATES = ("image_states", "image_states_2")
TEXT_STATES = {"input_ids": "text_states", "masked_input_ids": "masked_states"}
"""Fields of a `Batch` with features, by the fields of the ids that they belong to."""
CONTENT = "content.json"  # description of a folder of the cache

_COMMIT_BYTES = 2**26
_MAX_HELD = 65_536  # examples whose small tensors stay in memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrozenFeatures:
    """Hidden states of a frozen tower, one row for each view of an image or for each text."""

    table: Table
    # of each row, in the table, which is in the order of writing
    row_indices: Int[np.ndarray, " n"]
    num_layers: int
    width: int
    dtype: torch.dtype
    num_views: int = 1  # of each image
    vectors: Float[Tensor, "n w"] | None = None  # of pooled states, all in memory

    def read(
        self, rows: Sequence[int], min_length: int = 0
    ) -> Float[Tensor, "b k l w"] | Float[Tensor, "b w"]:
        """Returns rows, padded with zeros to the longest of them or to a length. A negative row counts from the end."""
        if self.vectors is not None:
            return self.vectors[list(rows)]
        states, _ = self.read_states(rows, min_length)
        return states

    def read_states(
        self, rows: Sequence[int], min_length: int = 0
    ) -> tuple[Float[Tensor, "b k l w"], Bool[Tensor, "b l"]]:
        """Returns hidden states, padded with zeros, and a mask that is False on padding."""
        indices = self.row_indices[list(rows)].tolist()
        contents = self.table.take(indices, ["states"])["states"]
        token_bytes = self.width * self.dtype.itemsize
        arrays = []
        for content in contents:
            array = np.frombuffer(content.as_buffer(), np.uint8)
            arrays.append(array.reshape(self.num_layers, -1, token_bytes))
        lengths = torch.tensor([array.shape[1] for array in arrays])
        length = max(min_length, int(lengths.max()))
        padded = np.zeros((len(arrays), self.num_layers, length, token_bytes), np.uint8)
        for row, array in enumerate(arrays):
            padded[row, :, : array.shape[1]] = array
        mask = torch.arange(length) < lengths[:, None]
        return torch.from_numpy(padded).view(self.dtype), mask


def cached_features(
    cache: Path,
    content: Mapping[str, Any],
    num_rows: int,
    num_tokens: float,
    compute: Callable[[Sequence[int]], Iterable[Float[Tensor, "k l w"]]],
    *,
    num_layers: int,
    width: int,
    dtype: torch.dtype,
    num_views: int = 1,
    description: str = "rows",
    progress: bool = False,
) -> FrozenFeatures:
    """Computes rows that are missing, a share of them in each process, and returns all.

    Rows are committed as they are computed, and outlast a kill. Of two runs with the same content one waits.

    Args:
        cache: Folder with a folder of features for each content; runs may share it.
        content: All that decides the rows; its digest names the folder.
        num_rows: Number of rows.
        num_tokens: Mean number of tokens of a row, for the space that is needed.
        compute: Yields the states of rows.
        num_layers: Layers of the states.
        width: Width of the states.
        dtype: Type of the states.
        num_views: Rows of each image.
        description: Names the rows in the bar.
        progress: Show a bar.

    Raises:
        OSError: The disk has no room.
    """
    import pyarrow as pa

    digest = hashlib.sha256(json_text(content, indent=2).encode()).hexdigest()
    folder = cache / digest[:16]
    path = folder / "states.lance"
    with ExitStack() as writing:
        # The first process finds out which rows are missing.
        is_missing: Any = None
        if rank() == 0:
            writing.enter_context(locked(folder, wait=True))
            is_missing = torch.ones(num_rows, dtype=torch.bool)
            if Table.exists(path):
                table = Table(path)
                table.recover()
                is_missing[torch.from_numpy(table.column("row"))] = False
            else:
                write_bytes(folder / CONTENT, json_text(content, indent=2).encode())
                schema = pa.schema([("row", pa.int64()), ("states", pa.large_binary())])
                Table.create(path, schema, checked="states", replace=path.exists())
            row_bytes = num_tokens * num_layers * width * dtype.itemsize
            require_space(folder, int(is_missing.sum() * row_bytes), "features of frozen towers")
        missing = broadcast_object(is_missing).nonzero()[:, 0]

        # Each process computes its share.
        if len(missing):
            rows = missing[rank() :: world_size()].tolist()
            states = counted(
                compute(rows), f"towers: {description}", enabled=progress, total=len(rows)
            )
            table = Table(path)
            pending: dict[int, bytes] = {}
            pending_bytes = 0
            for row, row_states in zip(rows, states, strict=True):
                pending[row] = row_states.contiguous().view(torch.uint8).numpy().tobytes()
                pending_bytes += len(pending[row])
                if pending_bytes >= _COMMIT_BYTES or row == rows[-1]:
                    contents = pa.array(list(pending.values()), pa.large_binary())
                    table.append(pa.table({"row": list(pending), "states": contents}))
                    pending = {}
                    pending_bytes = 0
            barrier()
    table = Table(path)
    row_indices = table.column("row").argsort()
    return FrozenFeatures(table, row_indices, num_layers, width, dtype, num_views)


class FrozenDataset(Dataset[Batch]):
    """Wraps a dataset so that its batches have features of frozen towers in place of pixels, and beside ids.

    Each example has a fixed number of views, as the features have, and its random choices are made once per view.

    Args:
        examples: The dataset.
        images: The images that it takes pixels of; they give indices from now on.
        features: Features of these images.
        seed: Seed of the views.
    """

    def __init__(
        self, examples: BatchDataset, images: PreparedImages, features: FrozenFeatures, seed: int
    ) -> None:
        images.read_features = torch.tensor
        self.examples = examples
        self.images = images
        self.image_features = features
        self.text_features: FrozenFeatures | None = None
        self.row_of_text: dict[bytes, int] = {}
        self.seed = seed
        self._held: dict[tuple[int, int], Batch] = {}

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def set_numbers(self) -> Int[Tensor, " n"]:
        numbers: Tensor = self.examples.set_numbers  # type: ignore[attr-defined]
        return numbers

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_held": {}}

    def __getitem__(self, key: BatchKey) -> Batch:
        generator = torch.Generator().manual_seed(key.seed)
        batch = self._drawn_views(key, generator)
        values: dict[str, Any] = {}

        # Images: any view of each.
        num_views = self.image_features.num_views
        for name in IMAGE_STATES:
            indices = getattr(batch, name)
            if indices is not None:
                views = torch.randint(num_views, (len(indices),), generator=generator)
                values[name] = self.image_features.read((indices * num_views + views).tolist())

        # Texts: one read for plain and masked ones.
        if self.text_features is not None:
            fields = [name for name in TEXT_STATES if getattr(batch, name, None) is not None]
            keys = _text_keys_of(batch)
            rows = [self.row_of_text[text] for text in keys]
            states = self.text_features.read(rows, batch.input_ids.shape[1])
            for field, field_states in zip(fields, states.chunk(len(fields)), strict=True):
                values[TEXT_STATES[field]] = field_states

        if key.step:
            counts = []
            for other in key.step:
                other_generator = torch.Generator().manual_seed(other.seed)
                counts.append(self._drawn_views(other, other_generator).num_labels)
            values["step_labels"] = torch.stack(counts).sum()
        whole: Batch = replace(batch, **values)
        return whole

    def needed_texts(self) -> list[bytes]:
        """Returns the keys of all texts in all views of the examples, each once, short texts first."""
        keys: set[bytes] = set()
        with self.images.held():
            for example in range(len(self)):
                for view in range(self.image_features.num_views):
                    keys.update(_text_keys_of(self._view(example, view)))
        return sorted(keys, key=lambda key: (len(key), key))

    def use_text_features(self, keys: Sequence[bytes], features: FrozenFeatures) -> None:
        """Adds the features of texts, a row for each key, to all batches."""
        self.text_features = features
        self.row_of_text = {key: row for row, key in enumerate(keys)}

    def _view(self, example: int, view: int) -> Any:
        """Returns a batch of one example, with an explicit mask."""
        held = self._held.get((example, view))
        if held is not None:
            return held
        seed = derive_seed(self.seed, "view of an example", example, view)
        batch: Any = self.examples[BatchKey((example,), seed)]
        if batch.attention_mask is None:
            batch = replace(batch, attention_mask=torch.ones_like(batch.input_ids))
        if len(self._held) < _MAX_HELD:
            self._held[example, view] = batch
        return batch

    def _drawn_views(self, key: BatchKey, generator: torch.Generator) -> Any:
        """Returns a batch of the examples of a key, of any view of each."""
        num_views = self.image_features.num_views
        views = torch.randint(num_views, (len(key.examples),), generator=generator).tolist()
        batches = [
            self._view(example, view) for example, view in zip(key.examples, views, strict=True)
        ]
        return joined(batches, seed=key.seed)


def _text_keys_of(batch: Any) -> list[bytes]:
    keys: list[bytes] = []
    for name in TEXT_STATES:
        input_ids = getattr(batch, name, None)
        if input_ids is not None:
            keys += text_keys(input_ids, batch.attention_mask)
    return keys


def text_keys(
    input_ids: Int[Tensor, "b l"], attention_mask: Int[Tensor, "b l"] | None
) -> list[bytes]:
    """Returns the ids of each text without padding, as bytes."""
    lengths = [input_ids.shape[1]] * len(input_ids)
    if attention_mask is not None:
        lengths = attention_mask.sum(dim=1).tolist()
    return [ids[:length].tobytes() for ids, length in zip(input_ids.numpy(), lengths, strict=True)]


def key_ids(key: bytes) -> Int[Tensor, " l"]:
    """Returns the token ids that `text_keys` made a key of."""
    return torch.frombuffer(bytearray(key), dtype=torch.int64)
