"""Processes of a run compute features of frozen towers together, each row once, and read the same."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor

from bridgetower.data import frozen
from bridgetower.data.frozen import FeatureCache


def computed_and_read(folder: Path) -> list[tuple[list[int], list[float]]]:
    """The rows that this process computed, and what it reads of all, for two contents and for the last one again."""
    frozen._COMMIT_BYTES = 1  # so that processes write at the same time
    found = []
    for num_rows in (7, 10, 10):
        computed: list[int] = []

        def compute(rows: Sequence[int], computed: list[int] = computed) -> Iterator[Tensor]:
            for row in rows:
                computed.append(row)
                yield torch.full((1, 2, 3), float(row))

        with FeatureCache(folder, 2**30) as cache:
            shape: dict[str, Any] = {"num_layers": 1, "width": 3, "dtype": torch.float32}
            features = cache.features({"rows": num_rows}, num_rows, 2, compute, **shape)
        found.append((computed, features.read(range(num_rows))[:, 0, 1, 2].tolist()))
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_each_row_is_computed_once_and_read_by_all(world_size: int, tmp_path: Path) -> None:
    *first, again = zip(*run_on_ranks(world_size, computed_and_read, tmp_path), strict=True)
    for num_rows, found in zip((7, 10), first, strict=True):
        assert sorted(row for computed, _ in found for row in computed) == list(range(num_rows))
        assert max(len(computed) for computed, _ in found) == -(-num_rows // world_size)
        assert all(states == list(range(num_rows)) for _, states in found)
    assert all((computed, states) == ([], list(range(10))) for computed, states in again)
