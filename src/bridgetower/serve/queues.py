"""Work of requests in turn: items of a model in batches, the start of requests, and work in threads."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from threading import Condition, Thread
from typing import Any, Generic, NamedTuple, TypeVar

from prometheus_client import Gauge

from bridgetower.serve.errors import ApiError
from bridgetower.serve.fairness import CLIENT, FairQueue, RequestJobs, Shares
from bridgetower.serve.metrics import Metrics

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

FETCHING = 1000
"""Requests that wait for other hosts; a client may have half of them."""

_BATCH_SECONDS = 0.1  # after which a batch is closed, by the rate so far
_RECENT_SECONDS = 1.0  # for which a client that had a job counts among those that share a batch
# A request counts for at most this fraction of the queue: it alone waits for the rest of its work.
_REQUEST_SHARE = 4
_ADDED = 100  # items that are added to a queue before the event loop goes on
_DRAWN = 100  # values of an iterator that a thread draws for a request before the next one's turn
_FAILED = 3  # batches in a row after which the model is taken for broken
_SMOOTHING = 0.2  # of the newest batch in a rate


class Work(NamedTuple):
    """The lane and the cost of an item."""

    lane: str
    cost: float


class _Submitted(Generic[_Result]):
    """Results of the items of one `submit`, as far as they are computed."""

    def __init__(self, count: int, now: float) -> None:
        self.since = now
        self.done: asyncio.Future[list[_Result]] = asyncio.get_running_loop().create_future()
        self._results: dict[int, _Result] = {}
        self._count = count

    def add(self, number: int, outcome: _Result | BaseException) -> None:
        if self.done.done():
            return
        if isinstance(outcome, BaseException):
            self.done.set_exception(outcome)
            return
        self._results[number] = outcome
        if len(self._results) == self._count:
            self.done.set_result([self._results[row] for row in range(self._count)])


@dataclass(frozen=True, eq=False)
class _Job(Generic[_Item, _Result]):
    submitted: _Submitted[_Result]
    number: int  # of the item in its request
    item: _Item
    cost: float


class _Lane(Generic[_Item, _Result]):
    """A thread and the jobs that wait for it."""

    def __init__(self, name: str, max_batch: int, queued: Gauge) -> None:
        self.max_batch = max_batch
        self._queued = queued
        self.queue: FairQueue[_Job[_Item, _Result]] = FairQueue()
        self.rate = math.inf  # cost per second
        self._last_jobs: dict[Hashable, float] = {}  # seconds of the clock, by client
        self.wake = asyncio.Event()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"model-{name}")

    def next_batch(self, now: float) -> list[_Job[_Item, _Result]]:
        """Takes jobs until the batch is full, or takes as long as a batch may.

        Clients share the time of a batch: whoever comes while it is computed waits for less of one client's work.
        """
        batch: list[_Job[_Item, _Result]] = []
        seconds = 0.0
        seconds_of: dict[Hashable, float] = {}
        self._last_jobs = {
            client: last for client, last in self._last_jobs.items() if now - last < _RECENT_SECONDS
        }
        while self.queue and len(batch) < self.max_batch and seconds < _BATCH_SECONDS:
            client = self.queue.next_client()
            self._last_jobs[client] = now
            if seconds_of.get(client, 0.0) >= _BATCH_SECONDS / len(self._last_jobs):
                break
            request, job = self.queue.take()
            self._queued.dec(job.cost)
            if job.submitted.done.done():  # nobody waits for it any more
                continue
            self.queue.charge(request, job.cost)
            batch.append(job)
            job_seconds = job.cost / self.rate
            seconds += job_seconds
            seconds_of[client] = seconds_of.get(client, 0.0) + job_seconds
        return batch


def _smoothed(rate: float, newest: float) -> float:
    return newest if math.isinf(rate) else rate + _SMOOTHING * (newest - rate)


class Scheduler(Generic[_Item, _Result]):
    """Admits requests by their cost and computes their items in batches, by weighted fair queueing.

    Clients have equal shares of each lane, and of a client its requests. Each lane has a thread, so that what costs
    little waits for nothing that costs much. A batch never waits to fill: the next one gathers meanwhile.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[_Item]], Sequence[_Result]],
        work_of: Callable[[_Item], Work],
        *,
        lanes: Mapping[str, int],
        queue: float,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Starts threads.

        Args:
            compute: Returns the result of each of some items.
            work_of: Returns the lane and the cost of an item.
            lanes: Most items of a batch in each lane.
            queue: Most cost that is admitted and not yet answered.
            metrics: Where it is counted.
            clock: Seconds.
        """
        self._compute = compute
        self._work_of = work_of
        self._queue = Shares(queue)
        self._fetching_queue = Shares(queue)
        self._fetches = Shares(FETCHING)
        self._metrics = metrics or Metrics()
        self._clock = clock
        self._rate = float(max(lanes.values()))  # cost per second
        self._closing = False
        self._failed = 0  # batches in a row of which no item could be computed
        self._lanes = {
            name: _Lane[_Item, _Result](name, most, self._metrics.queued)
            for name, most in lanes.items()
        }
        self._tasks = [asyncio.create_task(self._run(lane)) for lane in self._lanes.values()]

    @property
    def admitted(self) -> float:
        return self._queue.held + self._fetching_queue.held

    @property
    def alive(self) -> bool:
        """Whether the loops that compute items are running, and not every one of the last batches failed."""
        return not any(task.done() for task in self._tasks) and self._failed < _FAILED

    @contextmanager
    def admission(self, cost: float, *, fetches: bool = False) -> Iterator[None]:
        """Keeps room for a request. Requests that fetch have their own room, as hosts may be slow."""
        client = CLIENT.get()
        shares = self._fetching_queue if fetches else self._queue
        counted = min(cost, shares.total / _REQUEST_SHARE)
        if not shares.fits(client, counted) or (fetches and not self._fetches.fits(client, 1)):
            seconds = max(1, math.ceil(shares.held / self._rate))
            message = f"the server is busy: too much work is queued; try again in {seconds} s"
            raise ApiError(429, message, headers={"Retry-After": str(seconds)})
        with ExitStack() as stack:
            stack.enter_context(shares.holding(client, counted))
            if fetches:
                stack.enter_context(self._fetches.holding(client, 1))
            self._metrics.admitted.inc(counted)
            stack.callback(self._metrics.admitted.dec, counted)
            yield

    async def submit(self, items: Sequence[_Item]) -> list[_Result]:
        """Returns the results of items that were admitted. Once it is cancelled, they are dropped."""
        if not items:
            return []
        submitted: _Submitted[_Result] = _Submitted(len(items), self._clock())
        requests: dict[str, RequestJobs[_Job[_Item, _Result]]] = {}
        try:
            for number, item in enumerate(items):
                name, cost = self._work_of(item)
                lane = self._lanes[name]
                if name not in requests:
                    requests[name] = lane.queue.request()
                lane.queue.add(requests[name], _Job(submitted, number, item, cost))
                lane.wake.set()
                self._metrics.queued.inc(cost)
                if number % _ADDED == _ADDED - 1:
                    await asyncio.sleep(0)
            return await submitted.done
        finally:
            for name, request in requests.items():
                dropped = self._lanes[name].queue.drop(request)
                self._metrics.queued.dec(sum(job.cost for job in dropped))

    async def close(self) -> None:
        """Computes what was submitted, then stops."""
        self._closing = True
        for lane in self._lanes.values():
            lane.wake.set()
        await asyncio.gather(*self._tasks)
        for lane in self._lanes.values():
            lane.thread.shutdown()

    async def _run(self, lane: _Lane[_Item, _Result]) -> None:
        while True:
            await lane.wake.wait()
            batch = lane.next_batch(self._clock())
            if batch:
                await self._compute_batch(lane, batch)
            elif self._closing:
                return
            else:
                lane.wake.clear()

    async def _compute_batch(
        self, lane: _Lane[_Item, _Result], batch: Sequence[_Job[_Item, _Result]]
    ) -> None:
        cost = sum(job.cost for job in batch)
        started = self._clock()
        for submitted in dict.fromkeys(job.submitted for job in batch):
            self._metrics.queue_seconds.observe(started - submitted.since)
        self._metrics.computing.inc(cost)

        items = [job.item for job in batch]
        outcomes = await asyncio.get_running_loop().run_in_executor(
            lane.thread, self._outcomes, items
        )

        seconds = self._clock() - started
        rate = cost / max(seconds, 1e-6)
        lane.rate = _smoothed(lane.rate, rate)
        self._rate = _smoothed(self._rate, rate)
        self._metrics.computing.dec(cost)
        self._metrics.batch_items.observe(len(batch))
        self._metrics.batch_seconds.observe(seconds)

        have_failed = all(isinstance(outcome, BaseException) for outcome in outcomes)
        self._failed = self._failed + 1 if have_failed else 0
        for job, outcome in zip(batch, outcomes, strict=True):
            job.submitted.add(job.number, outcome)

    def _outcomes(self, items: Sequence[_Item]) -> list[_Result | BaseException]:
        """Computes items together or, if that fails, each alone, so that only bad items fail."""
        try:
            return list(self._compute(items))
        except BaseException as error:  # noqa: BLE001 - passed to who waits
            if len(items) == 1:
                return [error]
        return [outcome for item in items for outcome in self._outcomes([item])]


class Starts:
    """Lets one request begin in each round of the event loop, clients in turn.

    Checking and admitting a request takes time too, which many requests of one client would take from others.
    """

    def __init__(self) -> None:
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue()

    async def turn(self) -> None:
        """Waits until this request may begin."""
        loop = asyncio.get_running_loop()
        begun: asyncio.Future[None] = loop.create_future()
        if not self._queue:
            loop.call_soon(self._begin_next)
        request = self._queue.request()
        self._queue.add(request, begun)
        try:
            await begun
        finally:
            self._queue.drop(request)

    def _begin_next(self) -> None:
        if not self._queue:  # the waiting requests have ended
            return
        request, begun = self._queue.take()
        self._queue.charge(request, 1.0)
        if not begun.done():
            begun.set_result(None)
        if self._queue:
            asyncio.get_running_loop().call_soon(self._begin_next)


class _ThreadWork(NamedTuple):
    future: Future[Any]
    function: Callable[[], Any]

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.function())
        except Exception as error:  # noqa: BLE001 - passed to the caller
            self.future.set_exception(error)
        except BaseException as error:  # noqa: BLE001 - a panic in Rust, which only this work is to fail of
            self.future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))


class Turns:
    """Threads that work for clients and their requests in turn, by time, and do not keep the process from ending."""

    def __init__(
        self, count: int, name: str, clock: Callable[[], float] = time.thread_time
    ) -> None:
        self._count = count
        self._name = name
        self._clock = clock
        self._num_threads = 0
        self._closed = False
        self._changed = Condition()
        self._queue: FairQueue[_ThreadWork] = FairQueue()

    @contextmanager
    def turn(self) -> Iterator[RequestJobs[_ThreadWork]]:
        """Lends a queue for the work of one request. Work that was not begun is dropped at the end of the block."""
        with self._changed:
            request = self._queue.request()
        try:
            yield request
        finally:
            with self._changed:
                dropped = self._queue.drop(request)
            for work in dropped:
                work.future.cancel()

    async def run(
        self, request: RequestJobs[_ThreadWork], function: Callable[[], _Result]
    ) -> _Result:
        """Returns the result of a function in a thread. Cancelled before it begins, it is not called."""
        future: Future[_Result] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the threads are closed; do the work before")
            self._queue.add(request, _ThreadWork(future, function))
            self._changed.notify()
            if self._num_threads < self._count:
                self._num_threads += 1
                Thread(
                    target=self._serve, name=f"{self._name}-{self._num_threads}", daemon=True
                ).start()
        return await asyncio.wrap_future(future)

    async def drawn(self, values: Iterator[_Result]) -> list[_Result]:
        """Draws all values of an iterator for a request, a few at a time."""
        drawn: list[_Result] = []
        with self.turn() as turn:
            while values_of_turn := await self.run(turn, lambda: [*islice(values, _DRAWN)]):
                drawn += values_of_turn
        return drawn

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for work in self._queue.jobs():
                work.future.cancel()
            self._changed.notify_all()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                request, work = self._queue.take()
                expected = request.last_cost  # work in progress counts as much as the last
                self._queue.charge(request, expected)
            begun = self._clock()
            work.run()
            del work  # else it would be held until the next one comes
            with self._changed:
                seconds = self._clock() - begun
                self._queue.charge(request, seconds - expected)
                request.last_cost = seconds
            del request
