"""Work on a Ray cluster: models in processes of their own take one task after the other; the only module of Ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import ray

from bridgetower.distributed import available_cores
from bridgetower.search.config import SourceConfig

LOCAL = "local"
"""Instead of an address: a cluster of this machine, which ends with the run."""

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class _Worker:
    def __init__(self, make: Callable[[], Any], work: Callable[[Any, Any], Any]) -> None:
        self._model, self._work = make(), work

    def done(self, task: Any) -> Any:
        return self._work(self._model, task)


def done_on_ray(
    make: Callable[[], Any], work: Callable[[Any, Any], Result], tasks: Iterable[Any], config: SourceConfig
) -> Iterator[Result]:
    """Yields the results of tasks as soon as each is there, in any order; what a worker had that died is done again."""
    with _cluster(str(config.ray), config.ray_workers):
        resources, cores = ray.cluster_resources(), 1 + (config.num_workers or 0)
        gpus = int(resources.get("GPU", 0))
        room, unit = gpus or int(resources["CPU"]) // cores, "GPU" if gpus else "core"
        count = config.ray_workers or room
        if count > room:
            raise ValueError(f"ray_workers is {count}, but the cluster has {room} {unit}s, one for each worker")
        actor: Any = ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=cores, num_gpus=int(gpus > 0))(_Worker)
        workers: list[Any] = []
        busy: dict[Any, Any] = {}
        for task in tasks:
            done = []
            if len(workers) < count:
                workers.append(worker := actor.remote(make, work))
            else:
                done, _ = ray.wait(list(busy))
                worker = busy.pop(done[0])
            busy[worker.done.remote(task)] = worker
            yield from map(ray.get, done)
        logger.info("workers on Ray: %d, with a %s each", len(workers), unit)
        while busy:
            done, _ = ray.wait(list(busy))
            del busy[done[0]]
            yield ray.get(done[0])
        for worker in workers:
            ray.kill(worker)


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
    try:
        yield
    finally:
        ray.shutdown()
