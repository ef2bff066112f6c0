"""Images decoded and resized in worker processes, which hand them over in shared memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Item = TypeVar("Item")


def loaded(
    load: Callable[[Item], UInt8[Tensor, "3 h w"]], batches: Sequence[Sequence[Item]], *, num_workers: int
) -> Iterator[UInt8[Tensor, "b 3 h w"]]:
    """Yields batches of resized images, in order.

    Args:
        load: Gives a resized image; processes get a copy of it.
        batches: What to load.
        num_workers: Processes, each of which makes whole batches; 0 loads in this one.

    Raises:
        ValueError, OSError: As `load`.
    """
    if num_workers == 0:
        yield from (torch.stack([load(item) for item in batch]) for batch in batches)
        return
    loader: DataLoader[Tensor | Exception] = DataLoader(
        _Batches(load, batches), batch_size=None, num_workers=min(num_workers, len(batches))
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


class _Batches(Dataset[Tensor | Exception], Generic[Item]):
    """Whole batches; what is wrong with an image is handed over, since torch would wrap it into a traceback."""

    def __init__(self, load: Callable[[Item], Tensor], batches: Sequence[Sequence[Item]]) -> None:
        self.load, self.batches = load, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> UInt8[Tensor, "b 3 h w"] | Exception:
        try:
            return torch.stack([self.load(item) for item in self.batches[number]])
        except (ValueError, OSError) as error:
            return error
