"""Embeds blocks on a Ray cluster: a pool of workers, each with a model, over Ray Data; the only module of Ray."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray
import ray.data

from bridgetower.bulk.embedding import EmbeddedBlock, Embedder, embedded_blocks
from bridgetower.data.items import Block
from bridgetower.distributed import available_cores

LOCAL = "local"
"""Instead of an address: a cluster of this machine, which ends with the run."""

logger = logging.getLogger(__name__)


class _Worker:
    """A model in a process of its own, which embeds one block after the other."""

    def __init__(self, make: Callable[[], Embedder]) -> None:
        self._embedder = make()

    def __call__(self, blocks: pa.Table) -> pa.Table:
        given = map(pickle.loads, blocks["block"].to_pylist())
        return _table(embedded_blocks(self._embedder, given))


def _table(blocks: Iterable[object]) -> pa.Table:
    return pa.table({"block": pa.array(list(map(pickle.dumps, blocks)), pa.large_binary())})


def embedded_on_ray(
    make: Callable[[], Embedder], blocks: Iterable[Block], *, address: str, num_workers: int | None = None
) -> Iterator[EmbeddedBlock]:
    """Embeds blocks on a cluster and yields each as soon as it is done, in any order.

    A worker that dies is started again, with the block that it had. Blocks wait in the cluster's object store.

    Args:
        make: Loads the model, in every worker.
        blocks: Of a source; the files that they name must be where they are on every machine.
        address: Of the cluster, or `LOCAL`.
        num_workers: None: one for each GPU, or for each core where there is no GPU.

    Raises:
        OSError: There is no cluster at the address.
        ValueError: It has no room for so many workers.
    """
    with _cluster(address, num_workers):
        parts = [ray.put(_table([block])) for block in blocks]
        if not parts:
            return
        gpus = int(ray.cluster_resources().get("GPU", 0))
        room = gpus or int(ray.cluster_resources()["CPU"])
        count, unit = min(num_workers or room, len(parts)), "GPU" if gpus else "core"
        if count > room:
            raise ValueError(f"ray_workers is {num_workers}, but the cluster has {room} {unit}s, one for each worker")
        logger.info("%d blocks on Ray; workers: %d, with a %s each", len(parts), count, unit)
        results = ray.data.from_arrow_refs(parts).map_batches(
            _Worker,
            fn_constructor_args=(make,),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=count),
            num_cpus=1,
            num_gpus=1 if gpus else None,
        )
        for table in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from map(pickle.loads, table["block"].to_pylist())


@contextmanager
def _cluster(address: str, num_workers: int | None = None) -> Iterator[None]:
    """Connects to a cluster, or starts one; in a process that is connected already, that one is used and stays."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cores = max(available_cores(), num_workers or 1)
    options: dict[str, Any] = {"include_dashboard": False, "num_cpus": cores} if address == LOCAL else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **options)
    except ConnectionError as error:
        raise OSError(f"no Ray cluster at {address} ({error}); start one, or give {LOCAL}") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it says how each of its steps goes
    try:
        yield
    finally:
        ray.shutdown()
