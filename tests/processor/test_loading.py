"""Worker processes give the batches that this process would give, and its errors in one line."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bridgetower.processor import loaded


def picture(number: int) -> Tensor:
    if number < 0:
        raise ValueError(f"picture {number} is broken")
    if number > 90:
        raise FileNotFoundError(f"no picture {number}")
    return torch.full((3, 4, 5), number, dtype=torch.uint8)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_in_order(num_workers: int) -> None:
    batches = [[1, 2], [3], [4, 5, 6], [7]]
    found = list(loaded(picture, batches, num_workers=num_workers))
    assert [batch[:, 0, 0, 0].tolist() for batch in found] == batches
    assert all(batch.dtype == torch.uint8 for batch in found)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("number", "error"), [(-1, ValueError), (99, FileNotFoundError)])
def test_errors(num_workers: int, number: int, error: type[Exception]) -> None:
    batches = loaded(picture, [[1], [2, number], [3]], num_workers=num_workers)
    assert next(batches).shape == (1, 3, 4, 5)
    with pytest.raises(error) as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    assert str(number) in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_to_load(num_workers: int, tmp_path: Path) -> None:
    assert list(loaded(picture, [], num_workers=num_workers)) == []
