"""Hidden states of frozen towers: tables that runs share, and examples that have them in the place of pixels."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from bridgetower.data.batches.batch import Batch, BatchDataset, BatchKey, derive_seed, joined
from bridgetower.data.sets.store import Table
from bridgetower.distributed import barrier, broadcast_object, rank, world_size
from bridgetower.files import (
    json_text,
    locked,
    remove_folder,
    remove_leftovers,
    require_space,
    write_bytes,
)
from bridgetower.progress import counted

IMAGE_STATES = ("image_states", "image_states_2")
TEXT_STATES = {
    "input_ids": "text_states",
    "masked_input_ids": "masked_states",
}  # by the ids that they are of
CONTENT = "content.json"  # what a folder of the cache holds; the file is as old as the last use of the folder
_COMMIT_BYTES = 2**26  # of states, after which they are committed
_KEPT = 65_536  # examples whose small tensors stay in memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrozenFeatures:
    """Hidden states of a frozen tower, a row for each view of an image or for each text."""

    table: Table  # has the rows in the order in which they were written
    places: Int[np.ndarray, " n"]  # of the rows in the table
    num_layers: int
    width: int
    dtype: torch.dtype
    num_views: int = 1  # of each image; with a negative number the last image is meant
    pooled: bool = False  # to one vector each

    def read(
        self, rows: Sequence[int], length: int = 0
    ) -> Float[Tensor, "b k l w"] | Float[Tensor, "b w"]:
        """Returns some rows; those of fewer tokens than others, or than `length`, are filled up with zeros."""
        found = self.table.take(self.places[list(rows)].tolist(), ["states"])["states"]
        shape = self.num_layers, -1, self.width * self.dtype.itemsize
        parts = [np.frombuffer(value.as_buffer(), np.uint8).reshape(shape) for value in found]
        longest = 1 if self.pooled else max(length, *(part.shape[1] for part in parts))
        states = np.zeros((len(parts), shape[0], longest, shape[2]), np.uint8)
        for place, part in zip(states, parts, strict=True):
            place[:, : part.shape[1]] = part
        tensor = torch.from_numpy(states).view(self.dtype)
        return tensor[:, 0, 0] if self.pooled else tensor


class FeatureCache:
    """Tables of features, each in a folder named by a digest of what decides them, which a run holds until it ends."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit, self._held = folder, limit, ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def features(
        self,
        content: Mapping[str, Any],
        num_rows: int,
        tokens: float,
        compute: Callable[[Sequence[int]], Iterable[Float[Tensor, "k l w"]]],
        *,
        num_layers: int,
        width: int,
        dtype: torch.dtype,
        num_views: int = 1,
        pooled: bool = False,
        what: str = "rows",
        shown: bool = False,
    ) -> FrozenFeatures:
        """Computes what is missing, each process its share, in commits that outlast a kill; of two runs one waits."""
        import pyarrow as pa

        description = json_text(content, indent=2).encode()
        folder = self.folder / hashlib.sha256(description).hexdigest()[:16]
        place = folder / "states.lance"
        with ExitStack() as writing:
            missing: Any = None
            if rank() == 0:
                self._held.enter_context(locked(folder, shared=True, wait=True))
                writing.enter_context(locked(folder / "writing", wait=True))
                missing = torch.ones(num_rows, dtype=torch.bool)
                if Table.exists(place):
                    earlier = Table(place)
                    earlier.recover()
                    missing[torch.from_numpy(earlier.column("row"))] = False
                    os.utime(folder / CONTENT)
                else:
                    write_bytes(folder / CONTENT, description)
                    schema = pa.schema([("row", pa.int64()), ("states", pa.large_binary())])
                    Table.create(place, schema, checked="states", replace=place.exists())
                if missing.any():
                    self._make_room(
                        int(missing.sum() * tokens * num_layers * width * dtype.itemsize)
                    )
            missing = broadcast_object(missing).nonzero()[:, 0]
            if len(missing):
                own = missing[rank() :: world_size()].tolist()
                outputs = counted(compute(own), f"towers: {what}", enabled=shown, total=len(own))
                table, contents, size = Table(place), list[bytes](), 0
                for end, states in enumerate(outputs, start=1):
                    contents.append(states.contiguous().view(torch.uint8).numpy().tobytes())
                    size += len(contents[-1])
                    if size >= _COMMIT_BYTES or end == len(own):
                        rows = pa.array(own[end - len(contents) : end])
                        table.append(
                            pa.table({"row": rows, "states": pa.array(contents, pa.large_binary())})
                        )
                        contents, size = [], 0
                barrier()
        table = Table(place)
        places = table.column("row").argsort()
        return FrozenFeatures(table, places, num_layers, width, dtype, num_views, pooled)

    def _make_room(self, needed: int) -> None:
        """Removes folders that no run holds, the longest unused first, until limit and disk allow for more."""
        with locked(self.folder, wait=True):
            remove_leftovers(self.folder)
            found = sorted(self.folder.glob(f"*/{CONTENT}"), key=lambda path: path.stat().st_mtime)
            sizes = {path.parent: _size_of(path.parent) for path in found}
            for folder in list(sizes):
                if (
                    sum(sizes.values()) + needed <= self.limit
                    and needed <= shutil.disk_usage(self.folder).free
                ):
                    break
                with suppress(FileExistsError), locked(folder):
                    remove_folder(folder)
                    del sizes[folder]
            require_space(self.folder, needed, "features of frozen towers")
        if sum(sizes.values()) + needed > self.limit:
            logger.warning(
                "the features that runs hold take more than the limit of %.1f GiB",
                self.limit / 2**30,
            )


def _size_of(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # others may rename or remove it meanwhile
            size += path.stat().st_size if path.is_file() else 0
    return size


class FrozenDataset(Dataset[Batch]):
    """Examples in a fixed number of views, each drawn once, with what frozen towers made of their images and texts."""

    def __init__(
        self, examples: BatchDataset, images: FrozenFeatures, num_views: int, seed: int
    ) -> None:
        self.examples, self.images, self.num_views, self.seed = examples, images, num_views, seed
        # and the row of each by its key
        self.texts: tuple[FrozenFeatures, dict[bytes, int]] | None = None
        self._parts: dict[tuple[int, int], Batch] = {}

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def set_numbers(self) -> Int[Tensor, " n"]:
        numbers: Tensor = self.examples.set_numbers  # type: ignore[attr-defined]
        return numbers

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_parts": {}}

    def __getitem__(self, key: BatchKey) -> Batch:
        generator = torch.Generator().manual_seed(key.seed)
        batch, values = self._joined(key, generator), dict[str, Any]()
        for name in IMAGE_STATES:
            if (numbers := getattr(batch, name)) is not None:
                views = torch.randint(self.images.num_views, (len(numbers),), generator=generator)
                values[name] = self.images.read((numbers * self.images.num_views + views).tolist())
        if self.texts is not None:
            (features, row_of), fields = self.texts, list(_texts_of(batch))
            rows = [
                row_of[text] for ids, _ in fields for text in text_keys(ids, batch.attention_mask)
            ]
            states = features.read(rows, fields[0][0].shape[1]).chunk(len(fields))
            values |= zip((name for _, name in fields), states, strict=True)
        if key.step:
            others = (
                self._joined(other, torch.Generator().manual_seed(other.seed)) for other in key.step
            )
            values["step_labels"] = torch.stack([other.num_labels for other in others]).sum()
        whole: Batch = replace(batch, **values)
        return whole

    def _part(self, example: int, view: int) -> Any:
        """Returns a batch of one example in a view, with an explicit mask."""
        if (found := self._parts.get((example, view))) is not None:
            return found
        seed = derive_seed(self.seed, "view of an example", example, view)
        batch: Any = self.examples[BatchKey((example,), seed)]
        mask = (
            torch.ones_like(batch.input_ids)
            if batch.attention_mask is None
            else batch.attention_mask
        )
        part = replace(batch, attention_mask=mask)
        if len(self._parts) < _KEPT:
            self._parts[example, view] = part
        return part

    def needed_texts(self) -> list[bytes]:
        """Returns the keys of all texts in all views of the examples, without repeats, short ones first."""
        parts = (
            self._part(example, view)
            for example in range(len(self))
            for view in range(self.num_views)
        )
        keys = {
            key
            for part in parts
            for ids, _ in _texts_of(part)
            for key in text_keys(ids, part.attention_mask)
        }
        return sorted(keys, key=lambda key: (len(key), key))

    def _joined(self, key: BatchKey, generator: torch.Generator) -> Any:
        drawn = torch.randint(self.num_views, (len(key.examples),), generator=generator).tolist()
        parts = [
            self._part(example, view) for example, view in zip(key.examples, drawn, strict=True)
        ]
        return joined(parts, seed=key.seed)


def _texts_of(batch: Batch) -> Iterator[tuple[Int[Tensor, "b l"], str]]:
    for name, states in TEXT_STATES.items():
        if (ids := getattr(batch, name, None)) is not None:
            yield ids, states


def text_keys(
    input_ids: Int[Tensor, "b l"], attention_mask: Int[Tensor, "b l"] | None
) -> list[bytes]:
    """Returns for each text what it is found by; padding does not count."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return [ids[kept.bool()].numpy().tobytes() for ids, kept in zip(input_ids, mask, strict=True)]


def key_ids(key: bytes) -> Int[Tensor, " l"]:
    """Returns the token ids that `text_keys` made a key of."""
    return torch.frombuffer(bytearray(key), dtype=torch.int64)
