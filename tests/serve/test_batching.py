"""Batches of several requests, turns, room, and an end that finishes what was taken in."""

import asyncio
import contextlib
import threading
from contextlib import asynccontextmanager

import pytest

from bridgetower.serve.errors import ApiError
from bridgetower.serve.metrics import Metrics
from bridgetower.serve.queues import FETCHING, Batcher

pytestmark = pytest.mark.anyio


class Doubling:
    def __init__(self):
        self.batches = []
        self.gate = threading.Event()

    def __call__(self, numbers):
        self.batches.append(list(numbers))
        assert self.gate.wait(300)
        if -1 in numbers:
            raise ValueError("minus one")
        return [2 * number for number in numbers]

    async def seen(self):
        while not self.batches:
            await asyncio.sleep(0.001)


@asynccontextmanager
async def batching(*, closed=False, **settings):
    """Lends what doubles in batches, and its queue; both stop at the end."""
    doubling = Doubling()
    if not closed:
        doubling.gate.set()
    batcher = Batcher(doubling, **{"max_batch": 4, "queue": 200, **settings})
    yield doubling, batcher
    await batcher.close()


async def begun(batcher, *requests):
    """Submits requests that wait until the gate opens."""
    tasks = [asyncio.create_task(batcher.submit(numbers)) for numbers in requests]
    await asyncio.sleep(0)
    return tasks


async def test_requests_that_come_together_are_computed_together():
    async with batching(closed=True, max_batch=8) as (doubling, batcher):
        first = await begun(batcher, [1])
        await doubling.seen()
        others = await begun(batcher, *([number, number + 1] for number in (10, 20, 30)))
        doubling.gate.set()
        assert await asyncio.gather(*first, *others) == [[2], [20, 22], [40, 42], [60, 62]]
        assert [len(batch) for batch in doubling.batches] == [1, 6]


async def test_a_large_request_takes_turns_with_small_ones():
    finished = []
    async with batching(closed=True) as (doubling, batcher):
        large = await begun(batcher, list(range(100)))
        await doubling.seen()
        tasks = large + await begun(batcher, [1000], [1001])
        for task in tasks:
            task.add_done_callback(finished.append)
        doubling.gate.set()
        assert await asyncio.gather(*tasks) == [list(range(0, 200, 2)), [2000], [2002]]
        assert finished == [*tasks[1:], *large]
        assert {1000, 1001} <= set(doubling.batches[1])
        assert all(len(batch) == 4 for batch in doubling.batches[:25])


async def test_no_more_is_admitted_than_the_queue_takes():
    async with batching(queue=100) as (_, batcher):
        with batcher.admission(90):
            assert batcher.admitted == 90
            with pytest.raises(ApiError, match="try again in 23 s") as caught, batcher.admission(11):
                pass
            assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "23"})  # 90 items, 4 a second
            with batcher.admission(10):
                assert batcher.admitted == 100
        assert batcher.admitted == 0


async def test_requests_that_fetch_take_no_places_of_others():
    async with batching(queue=600) as (_, batcher):
        with contextlib.ExitStack() as stack:
            for count in (100, *[1] * (FETCHING - 1)):
                stack.enter_context(batcher.admission(count, fetches=True))
            for count in (1, 2):
                with pytest.raises(ApiError), batcher.admission(count, fetches=True):
                    pass
            with batcher.admission(600):
                assert batcher.admitted == 1199
        with batcher.admission(1, fetches=True), pytest.raises(ApiError), batcher.admission(600, fetches=True):
            pass
        assert batcher.admitted == 0


async def test_what_a_client_no_longer_waits_for_is_not_computed():
    async with batching(closed=True, max_batch=2) as (doubling, batcher):
        first = await begun(batcher, [1, 2])
        await doubling.seen()
        left, kept = await begun(batcher, [100] * 50, [5])
        left.cancel()
        await asyncio.sleep(0)
        doubling.gate.set()
        assert await asyncio.gather(*first, kept) == [[2, 4], [10]]
        assert doubling.batches == [[1, 2], [5]]


async def test_closing_finishes_what_was_submitted():
    async with batching(closed=True, max_batch=2) as (doubling, batcher):
        tasks = await begun(batcher, *([number] * 5 for number in range(3)))
        await doubling.seen()
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.01)
        assert not closing.done()
        doubling.gate.set()
        assert await asyncio.gather(*tasks) == [[0] * 5, [2] * 5, [4] * 5]
        await closing
        assert not batcher.alive


async def test_items_and_batches_are_counted():
    metrics = Metrics()

    def figures():
        lines = [line.split() for line in metrics.text().decode().splitlines() if line.startswith("bridgetower_")]
        return {name.removeprefix("bridgetower_"): float(value) for name, value in lines}

    async with batching(closed=True, max_batch=2, queue=9, metrics=metrics) as (doubling, batcher):
        with batcher.admission(5):
            tasks = await begun(batcher, [1] * 5, [2] * 5)
            await doubling.seen()
            found = figures()
            assert (found["items_admitted"], found["items_queued"], found["items_computing"]) == (5, 8, 2)
            tasks[1].cancel()
            await asyncio.gather(tasks[1], return_exceptions=True)
            assert figures()["items_queued"] == 4
            doubling.gate.set()
            assert await tasks[0] == [2] * 5
        assert await batcher.submit([]) == []
    found = figures()
    assert [found[f"items_{name}"] for name in ("admitted", "queued", "computing")] == [0, 0, 0]
    assert found["batch_items_sum"] == sum(map(len, doubling.batches))
    assert found["batch_seconds_sum"] > 0
    assert found["queue_seconds_count"] == len(doubling.batches) + 1  # the first batch has items of both requests
    async with batching(max_batch=1, metrics=metrics) as (_, batcher):
        with pytest.raises(ValueError, match="minus one"):
            await batcher.submit([-1, 1, 1])
    assert figures()["items_queued"] == 0


async def test_an_item_that_fails_fails_its_request_alone():
    async with batching(closed=True, max_batch=8) as (doubling, batcher):
        first = await begun(batcher, [1])
        await doubling.seen()
        others = await begun(batcher, [2, 3], [4, -1, 5, 6, 7, 8, 9], [5])
        doubling.gate.set()
        *found, failed = await asyncio.gather(*first, others[0], others[2], others[1], return_exceptions=True)
        assert found == [[2], [4, 6], [10]]
        assert isinstance(failed, ValueError)
        assert batcher.alive
        assert await batcher.submit([3]) == [6]


async def test_a_model_that_always_fails_is_not_alive_until_it_computes_again():
    async with batching() as (_, batcher):
        for alive in (True, True, False):
            with pytest.raises(ValueError, match="minus one"):
                await batcher.submit([-1, -1])
            assert batcher.alive == alive
        assert await batcher.submit([1]) == [2]
        assert batcher.alive
