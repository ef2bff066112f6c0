"""Queues that serve requests in turn: items, computed in batches by one thread, and work for several threads."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition, Thread
from typing import Any, Generic, TypeVar

from bridgetower.serve.errors import ApiError
from bridgetower.serve.metrics import Metrics

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

FETCHING = 500
"""Requests at most that wait for other hosts; less than the server takes at once."""

_FAILED = 3  # batches in a row after which the model is taken for broken
_SMOOTHING = 0.2  # of the newest batch in the rate that Retry-After is estimated from


class _Request(Generic[_Item, _Result]):
    """Items of one `submit` that no batch has yet, and the results of those that were computed."""

    def __init__(self, items: Sequence[_Item]) -> None:
        self.left, self.count, self.submitted = deque(items), len(items), time.perf_counter()
        self.results: list[_Result] = []
        self.done: asyncio.Future[list[_Result]] = asyncio.get_running_loop().create_future()

    def add(self, outcome: _Result | BaseException) -> None:
        if self.done.done():
            return
        if isinstance(outcome, BaseException):
            self.done.set_exception(outcome)
            return
        self.results.append(outcome)
        if len(self.results) == self.count:
            self.done.set_result(self.results)


class Batcher(Generic[_Item, _Result]):
    """Computes items in batches, in one thread; it never waits for a batch to fill: the next one gathers meanwhile."""

    def __init__(
        self,
        compute: Callable[[Sequence[_Item]], Sequence[_Result]],
        *,
        max_batch: int,
        queue: int,
        metrics: Metrics | None = None,
    ) -> None:
        self._compute, self._max_batch, self._queue, self._metrics = compute, max_batch, queue, metrics or Metrics()
        self._admitted: dict[bool, list[int]] = {False: [], True: []}  # items of each request, by whether it fetches
        self._rate = float(max_batch)  # items per second
        self._waiting: deque[_Request[_Item, _Result]] = deque()
        self._wake = asyncio.Event()
        self._closing, self._failed = False, 0  # batches in a row of which no item could be computed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._work = asyncio.create_task(self._run())

    @property
    def admitted(self) -> int:
        return sum(map(sum, self._admitted.values()))

    @property
    def alive(self) -> bool:
        """Whether the loop that computes items is running, and not every one of the last batches failed."""
        return not self._work.done() and self._failed < _FAILED

    @contextmanager
    def admission(self, count: int, *, fetches: bool = False) -> Iterator[None]:
        """Reserves places for items of a request; those that fetch have their own, as hosts may be slow."""
        admitted = self._admitted[fetches]
        if sum(admitted) + count > self._queue or (fetches and len(admitted) == FETCHING):
            seconds = max(1, math.ceil(sum(admitted) / self._rate))
            message = f"the server is busy: too many items are queued; try again in {seconds} s"
            raise ApiError(429, message, headers={"Retry-After": str(seconds)})
        admitted.append(count)
        self._metrics.admitted.inc(count)
        try:
            yield
        finally:
            admitted.remove(count)
            self._metrics.admitted.dec(count)

    async def submit(self, items: Sequence[_Item]) -> list[_Result]:
        """Returns the results of items, which must have been admitted; if it is cancelled, they are dropped."""
        if not items:
            return []
        request: _Request[_Item, _Result] = _Request(items)
        self._waiting.append(request)
        self._wake.set()
        self._metrics.queued.inc(len(items))
        try:
            return await request.done
        finally:
            self._metrics.queued.dec(len(request.left))

    async def close(self) -> None:
        """Computes what was submitted, then stops."""
        self._closing = True
        self._wake.set()
        await self._work
        self._thread.shutdown()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            batch = self._next_batch()
            if not batch:
                if self._closing:
                    return
                self._wake.clear()
                continue
            started = time.perf_counter()
            for request in dict.fromkeys(request for request, _ in batch):
                self._metrics.queue_seconds.observe(started - request.submitted)
            self._metrics.queued.dec(len(batch))
            self._metrics.computing.set(len(batch))
            outcomes = await loop.run_in_executor(self._thread, self._outcomes, [item for _, item in batch])
            self._metrics.computing.set(0)
            seconds = time.perf_counter() - started
            self._rate += _SMOOTHING * (len(batch) / max(seconds, 1e-6) - self._rate)
            self._metrics.batch_items.observe(len(batch))
            self._metrics.batch_seconds.observe(seconds)
            self._failed = self._failed + 1 if all(isinstance(one, BaseException) for one in outcomes) else 0
            for (request, _), outcome in zip(batch, outcomes, strict=True):
                request.add(outcome)

    def _next_batch(self) -> list[tuple[_Request[_Item, _Result], _Item]]:
        """Takes items of the requests in turn, the same number of each while there are enough."""
        waiting = deque(request for request in self._waiting if request.left and not request.done.done())
        batch: list[tuple[_Request[_Item, _Result], _Item]] = []
        while waiting and len(batch) < self._max_batch:
            request = waiting.popleft()
            share = max(1, (self._max_batch - len(batch)) // (len(waiting) + 1))
            batch += [(request, request.left.popleft()) for _ in range(min(share, len(request.left)))]
            if request.left:
                waiting.append(request)
        self._waiting = waiting
        return batch

    def _outcomes(self, items: Sequence[_Item]) -> list[_Result | BaseException]:
        """Computes items together, or if that fails each alone: those that can be computed are not to suffer."""
        try:
            return list(self._compute(items))
        except BaseException as error:  # noqa: BLE001 - passed to who waits
            if len(items) == 1:
                return [error]
        return [outcome for item in items for outcome in self._outcomes([item])]


class Turn:
    """Work of one request that is not yet begun, and the time of its work so far."""

    def __init__(self) -> None:
        self.work: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self.spent = self.last = (
            0.0  # work in progress counts as long as the last; at least that of others when it came
        )

    def drop(self) -> None:
        for future, _ in self.work:
            future.cancel()
        self.work.clear()


class Turns:
    """Threads that work for the request with the least time so far, and do not keep the process from ending."""

    def __init__(self, count: int, name: str, clock: Callable[[], float] = time.thread_time) -> None:
        self._count, self._name, self._clock, self._started, self._closed = count, name, clock, 0, False
        self._changed = Condition()
        self._waiting: list[Turn] = []  # those with work; of those with the same time, the next one first
        self._reached = 0.0  # `spent` of one that had its share of all work so far, from which newcomers begin

    @contextmanager
    def turn(self) -> Iterator[Turn]:
        """Yields the queue of one request; at the end of the block, work that was not begun is dropped."""
        turn = Turn()
        try:
            yield turn
        finally:
            with self._changed:
                if turn.work:
                    self._waiting.remove(turn)
                    turn.drop()

    async def run(self, turn: Turn, work: Callable[[], _Result]) -> _Result:
        """Returns the result of work in a thread; if it is cancelled before it begins, it is not done."""
        future: Future[_Result] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the threads are closed; do the work before")
            if not turn.work:
                turn.spent = max(turn.spent, self._reached)
                self._waiting.append(turn)
            turn.work.append((future, work))
            self._changed.notify()
            if self._started < self._count:
                self._started += 1
                Thread(target=self._work, name=f"{self._name}-{self._started}", daemon=True).start()
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for turn in self._waiting:
                turn.drop()
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                turn = min(self._waiting, key=lambda waiting: waiting.spent)
                self._waiting.remove(turn)
                future, work = turn.work.popleft()
                if turn.work:
                    self._waiting.append(turn)
                self._reached, expected = max(self._reached, turn.spent), turn.last
                turn.spent += expected
            begun = self._clock()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:  # noqa: BLE001 - passed to the caller
                    future.set_exception(error)
                except BaseException as error:  # noqa: BLE001 - a panic in Rust, which only this work is to fail of
                    future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
            del future, work  # else they would be held until the next one comes
            with self._changed:
                turn.last = self._clock() - begun
                turn.spent += turn.last - expected
                self._reached += turn.last / (1 + len(self._waiting))  # else newcomers, one after the other, were first
