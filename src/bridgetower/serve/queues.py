"""Queues that serve requests in turn: items, computed in batches by one thread, and work for several threads."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any, Generic, TypeVar, cast

from bridgetower.serve.metrics import Metrics, held

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

FETCHING = 500
"""Requests at most that wait for other hosts; less than the server takes at once."""

_FAILED = 3  # batches in a row after which the model is taken for broken
_SMOOTHING = 0.2  # of the newest batch in the rate that Retry-After is estimated from


class QueueFullError(Exception):
    """Too many items are queued; how many seconds it takes to compute them is an estimate."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many items are queued; try again in {retry_after} s")
        self.retry_after = retry_after


class _Request(Generic[_Item, _Result]):
    """Items of one `submit`, and the results of those that were computed."""

    def __init__(self, items: Sequence[_Item]) -> None:
        self.items, self.taken, self.submitted = items, 0, time.perf_counter()
        self.results: list[_Result] = []
        self.done: asyncio.Future[list[_Result]] = asyncio.get_running_loop().create_future()

    @property
    def remaining(self) -> int:
        return 0 if self.done.done() else len(self.items) - self.taken

    def take(self, count: int) -> Sequence[_Item]:
        start, self.taken = self.taken, min(self.taken + count, len(self.items))
        return self.items[start : self.taken]

    def add(self, results: Sequence[_Result]) -> None:
        self.results += results
        if len(self.results) == len(self.items) and not self.done.done():
            self.done.set_result(self.results)

    def fail(self, error: BaseException) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Batcher(Generic[_Item, _Result]):
    """Computes items in batches, in one thread.

    It never waits for a batch to fill: while one is computed, the next one gathers. Requests take turns, so that one
    of many items does not delay those of few.
    """

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
        """Reserves places for items, from before they are prepared until their response is ready.

        Requests that fetch have as many places of their own, so that slow hosts take none from others.
        """
        admitted = self._admitted[fetches]
        if sum(admitted) + count > self._queue or (fetches and len(admitted) == FETCHING):
            raise QueueFullError(max(1, math.ceil(sum(admitted) / self._rate)))
        admitted.append(count)
        try:
            with held(self._metrics.admitted, count):
                yield
        finally:
            admitted.remove(count)

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
            self._metrics.queued.dec(len(items) - request.taken)

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
            shares = self._next_batch()
            if not shares:
                if self._closing:
                    return
                self._wake.clear()
                continue
            batch = [item for _, items in shares for item in items]
            started = time.perf_counter()
            for request, _ in shares:
                self._metrics.queue_seconds.observe(started - request.submitted)
            self._metrics.queued.dec(len(batch))
            with held(self._metrics.computing, len(batch)):
                computed = loop.run_in_executor(self._thread, self._compute, batch)
                await asyncio.wait([computed])
            seconds = time.perf_counter() - started
            self._rate += _SMOOTHING * (len(batch) / max(seconds, 1e-6) - self._rate)
            self._metrics.batch_items.observe(len(batch))
            self._metrics.batch_seconds.observe(seconds)
            self._failed = 0 if not computed.exception() else self._failed + 1
            if not computed.exception():
                self._deliver(shares, computed.result())
            elif len(batch) == 1:
                shares[0][0].fail(cast(BaseException, computed.exception()))
            else:  # the requests whose items can be computed alone are not to suffer
                outcomes = await loop.run_in_executor(self._thread, self._each_alone, batch)
                self._failed = 0 if any(isinstance(one, tuple) for one in outcomes) else self._failed
                start = 0
                for request, items in shares:
                    own = outcomes[start : start + len(items)]
                    start += len(items)
                    if errors := [one for one in own if isinstance(one, BaseException)]:
                        request.fail(errors[0])
                    else:
                        request.add([one[0] for one in own if isinstance(one, tuple)])

    def _each_alone(self, batch: Sequence[_Item]) -> list[tuple[_Result] | BaseException]:
        outcomes: list[tuple[_Result] | BaseException] = []
        for item in batch:
            try:
                outcomes.append((self._compute([item])[0],))
            except Exception as error:  # noqa: BLE001 - of this item alone
                outcomes.append(error)
        return outcomes

    @staticmethod
    def _deliver(shares: list[tuple[_Request[_Item, _Result], Sequence[_Item]]], results: Sequence[_Result]) -> None:
        start = 0
        for request, items in shares:
            request.add(results[start : start + len(items)])
            start += len(items)

    def _next_batch(self) -> list[tuple[_Request[_Item, _Result], Sequence[_Item]]]:
        """Takes items of the requests in turn, the same number of each while there are enough."""
        waiting = deque(request for request in self._waiting if request.remaining)
        shares, room = [], self._max_batch
        while waiting and room:
            request = waiting.popleft()
            items = request.take(max(1, room // (len(waiting) + 1)))
            shares.append((request, items))
            room -= len(items)
            if request.remaining:
                waiting.append(request)
        self._waiting = waiting
        return shares


@dataclass(eq=False)
class Turn:
    """Work of one request that is not yet begun.

    `spent` is the time of its work, that in progress as long as the last, and at least that of others when it came.
    """

    work: deque[tuple[Future[Any], Callable[[], Any]]] = field(default_factory=deque)
    spent: float = 0.0
    last: float = 0.0

    def drop(self) -> None:
        """Drops the work; who waits for it is cancelled."""
        for future, _ in self.work:
            future.cancel()
        self.work.clear()


class Turns:
    """Threads that work for the request with the least time so far, so that a long one does not delay the others.

    Work in a library, such as decoding an image, cannot be ended. So the threads do not keep the process from ending.
    """

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
        """Drops work that was not begun, without waiting for the rest."""
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
