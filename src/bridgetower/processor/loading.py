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
    """Yields an item for each key, in order; nothing is drawn from torch's global generator."""
    workers = min(num_workers, available_cores())  # more would be slower, and PyTorch warns
    context = None
    if workers and getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit  # in a worker that imports the script of the user again; the main process says why
    if workers:  # forked from a server without threads: those of Lance would be missing in a fork of this process
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
    started = list(getattr(items, "_workers", ()))  # other threads may have processes of their own
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
        ending = (
            f"was killed by signal {-codes[0]}"
            if codes and codes[0] < 0
            else f"ended with status {codes}"
        )
        raise ChildProcessError(
            f"a process that decodes images {ending}; perhaps memory ran short. Start the same command again, a "
            "training run with --resume; fewer workers and smaller batches take less memory"
        ) from error
    finally:
        del items  # lets the workers end
        for worker in started:  # and what hangs has to, as it ignores SIGTERM
            worker.kill()


def loaded(
    load: Callable[[Any], Shaped[Tensor, "..."]],
    batches: Sequence[Sequence[Any]],
    *,
    num_workers: int,
    device: torch.device = CPU,
) -> Iterator[Shaped[Tensor, "b ..."]]:
    """Yields batches of what `load` makes of their items."""
    return load_items(
        partial(_stacked, load), batches, num_workers=min(num_workers, len(batches)), device=device
    )


def _stacked(load: Callable[[Any], Tensor], batch: Sequence[Any]) -> Tensor:
    return torch.stack([load(item) for item in batch])


def _follow_main_process(worker: int) -> None:
    """Leaves it to the main process to stop, also where a signal is sent to the whole group, and ends with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Thread(target=_end_with_main_process, daemon=True).start()


def _end_with_main_process() -> None:
    main_process = multiprocessing.parent_process()
    if main_process is not None:
        main_process.join()  # PyTorch looks at the server that forked this process, which lives as long as this one
        os._exit(0)


class _Caught(Dataset[Any]):
    """Items by key; an error is handed over as an item, since torch would wrap it into a traceback."""

    def __init__(self, get: Callable[[Any], Any]) -> None:
        self.get = get

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.get(key)
        except (ValueError, OSError) as error:
            return error
