"""Reading in worker processes, with the errors that reading in this process would raise."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from threading import Thread
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bridgetower.distributed import available_cores

CPU = torch.device("cpu")


def load_items(
    get: Callable[[Any], Any], keys: Iterable[Any], *, num_workers: int, device: torch.device = CPU
) -> Generator[Any, None, None]:
    """Yields an item for each key, in order, and draws nothing from torch's global generator."""
    # More workers than cores would be slower, and PyTorch warns.
    workers = min(num_workers, available_cores())
    context = None
    if workers:
        # A worker that imports the user's script again ends here, and the main process says why.
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise SystemExit
        # Workers are forked from a server without threads: a fork of this process would lack the threads of Lance.
        context = multiprocessing.get_context("forkserver")
        preloaded = ("processor.worker_server", "data.batches.captions", "data.batches.examples")
        context.set_forkserver_preload([f"bridgetower.{name}" for name in preloaded])

    loader: DataLoader[Any] = DataLoader(
        _Caught(get),
        sampler=keys,
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
        worker_init_fn=_follow_main_process,
        multiprocessing_context=context,
    )
    items = iter(loader)
    # `active_children` would have processes of other threads too.
    started = list(getattr(items, "_workers", ()))
    try:
        for item in items:
            if isinstance(item, Exception):
                raise item
            yield item
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        if any(worker.exitcode == 1 for worker in started):
            raise ChildProcessError(
                f"the {workers} processes of num_workers, which import the script again, cannot start; put what the "
                'script does under `if __name__ == "__main__":`, or leave out num_workers'
            ) from None
        codes = [worker.exitcode for worker in started if worker.exitcode]
        ending = f"ended with status {codes}"
        if codes and codes[0] < 0:
            ending = f"was killed by signal {-codes[0]}"
        raise ChildProcessError(
            f"a process that decodes images {ending}; perhaps memory ran short. Start the same command again, a "
            "training run with --resume; fewer workers and smaller batches take less memory"
        ) from error
    finally:
        # Without the iterator the workers end. A worker that hangs ignores SIGTERM.
        del items
        for worker in started:
            worker.kill()


def loaded(
    load: Callable[[Any], Shaped[Tensor, "..."]],
    batches: Sequence[Sequence[Any]],
    *,
    num_workers: int,
    device: torch.device = CPU,
) -> Iterator[Shaped[Tensor, "b ..."]]:
    """Loads the items of each batch and yields them as one tensor."""
    workers = min(num_workers, len(batches))
    return load_items(partial(_stacked, load), batches, num_workers=workers, device=device)


def _stacked(load: Callable[[Any], Tensor], batch: Sequence[Any]) -> Tensor:
    return torch.stack([load(item) for item in batch])


def _follow_main_process(worker: int) -> None:
    """Ignores signals, which a launcher sends to the whole group, and ends the worker with the main process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    # PyTorch waits for the server that forked this process, which lives as long as this process.
    def end_with_main_process() -> None:
        main_process = multiprocessing.parent_process()
        if main_process is not None:
            main_process.join()
            os._exit(0)

    Thread(target=end_with_main_process, daemon=True).start()


class _Caught(Dataset[Any]):
    """Items by key. Errors are items too, since torch would wrap them into a traceback."""

    def __init__(self, get: Callable[[Any], Any]) -> None:
        self.get = get

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.get(key)
        except (ValueError, OSError) as error:
            return error
