"""Reading in worker processes, with the errors that reading in this process would raise."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing import active_children
from typing import Any, TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

CPU = torch.device("cpu")

Item = TypeVar("Item")


def load_items(
    get: Callable[[Any], Any], keys: Iterable[Any], *, num_workers: int, device: torch.device = CPU
) -> Generator[Any, None, None]:
    """Yields an item for each key, in order; nothing is drawn from torch's global generator.

    Args:
        get: Gives the item of a key; worker processes get a copy of it.
        keys: Are read as far ahead as workers go.
        num_workers: Processes that each make whole items; 0 makes them in this one.
        device: Where the items go; those for a GPU are pinned.

    Raises:
        ValueError, OSError: As `get`.
    """
    loader: DataLoader[Any] = DataLoader(
        _Caught(get),
        sampler=keys,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
        worker_init_fn=_ignore_signals,
    )
    others = set(active_children())
    items = iter(loader)
    workers = set(active_children()) - others
    try:
        for item in items:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        del items  # lets the workers end
        for worker in workers:  # and what hangs has to, as it ignores SIGTERM
            worker.kill()


def loaded(
    load: Callable[[Item], Shaped[Tensor, "..."]],
    batches: Sequence[Sequence[Item]],
    *,
    num_workers: int,
    device: torch.device = CPU,
) -> Iterator[Shaped[Tensor, "b ..."]]:
    """Yields batches of tensors, such as resized images, in order.

    Args:
        load: Gives a tensor; processes get a copy of it.
        batches: What to load.
        num_workers: Processes, each of which makes whole batches; 0 loads in this one.
        device: As in `load_items`.

    Raises:
        ValueError, OSError: As `load`.
    """
    return load_items(_Stacked(load), batches, num_workers=min(num_workers, len(batches)), device=device)


def _ignore_signals(worker: int) -> None:
    """Leaves it to the main process to stop: launchers, terminals and schedulers signal the whole group."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


class _Stacked:
    """Items of a batch as one tensor."""

    def __init__(self, load: Callable[[Any], Tensor]) -> None:
        self.load = load

    def __call__(self, batch: Sequence[Any]) -> Tensor:
        return torch.stack([self.load(item) for item in batch])


class _Caught(Dataset[Any]):
    """Items by key; an error is handed over as an item, since torch would wrap it into a traceback."""

    def __init__(self, get: Callable[[Any], Any]) -> None:
        self.get = get

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.get(key)
        except (ValueError, OSError) as error:
            return error
