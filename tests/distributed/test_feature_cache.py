"""Processes of a run compute features of frozen towers together, each row once, and read the same."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor

from bridgetower.data import frozen
from bridgetower.data.frozen import FeatureCache


def computed_and_read(folder: Path, num_rows: int) -> tuple[list[int], Tensor]:
    """The rows that this process computed, and what it reads of all."""
    frozen._COMMIT_BYTES, computed = 1, list[int]()  # so that processes write at the same time

    def compute(rows: Sequence[int]) -> Iterator[Tensor]:
        for row in rows:
            computed.append(row)
            yield torch.full((1, 2, 3), float(row))

    with FeatureCache(folder, 2**30) as cache:
        features = cache.features({}, num_rows, 2, compute, num_layers=1, width=3, dtype=torch.float32)
    return computed, features.read(range(num_rows))[:, 0, 1, 2]


@pytest.mark.parametrize("world_size", [2, 4])
def test_each_row_is_computed_once_and_read_by_all(world_size: int, tmp_path: Path) -> None:
    for num_rows in (7, 10):  # the second time, of another content
        folder = tmp_path / str(num_rows)
        found = run_on_ranks(world_size, computed_and_read, folder, num_rows)
        assert sorted(row for computed, _ in found for row in computed) == list(range(num_rows))
        assert max(len(computed) for computed, _ in found) == -(-num_rows // world_size)
        assert all(states.tolist() == list(range(num_rows)) for _, states in found)
    assert all(computed == [] for computed, _ in run_on_ranks(world_size, computed_and_read, folder, num_rows))
