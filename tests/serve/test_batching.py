"""Batches of several requests, turns, room, and an end that finishes what was taken in."""

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from unittest.mock import ANY

import pytest

from bridgetower.serve.errors import ApiError
from bridgetower.serve.metrics import Metrics
from bridgetower.serve.queues import FETCHING, Batcher

pytestmark = pytest.mark.anyio


class Doubling:
    """Doubles numbers while its gate is open; keeps the batches that it saw."""

    def __init__(self, *, gate: bool = True) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        if gate:
            self.gate.set()

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        assert self.gate.wait(300)
        if -1 in numbers:
            raise ValueError("minus one")
        return [2 * number for number in numbers]


async def seen(doubling: Doubling, count: int = 1) -> None:
    while len(doubling.batches) < count:
        await asyncio.sleep(0.001)


async def test_requests_that_come_together_are_computed_together() -> None:
    doubling = Doubling(gate=False)
    batcher = Batcher(doubling, max_batch=8, queue=100)
    first = asyncio.create_task(batcher.submit([1]))
    await seen(doubling)
    others = [asyncio.create_task(batcher.submit([number, number + 1])) for number in (10, 20, 30)]
    await asyncio.sleep(0)
    doubling.gate.set()
    assert await first == [2]
    assert await asyncio.gather(*others) == [[20, 22], [40, 42], [60, 62]]
    assert [len(batch) for batch in doubling.batches] == [1, 6]
    await batcher.close()


async def test_a_large_request_takes_turns_with_small_ones() -> None:
    doubling, finished = Doubling(gate=False), []
    batcher = Batcher(doubling, max_batch=4, queue=200)

    async def submit(name: str, numbers: list[int]) -> list[int]:
        results = await batcher.submit(numbers)
        finished.append(name)
        return results

    large = asyncio.create_task(submit("large", list(range(100))))
    await seen(doubling)
    small = [asyncio.create_task(submit("small", [1000 + number])) for number in range(2)]
    await asyncio.sleep(0)
    doubling.gate.set()
    assert await large == list(range(0, 200, 2))
    assert [await task for task in small] == [[2000], [2002]]
    assert finished == ["small", "small", "large"]
    assert {1000, 1001} <= set(doubling.batches[1])
    assert all(len(batch) == 4 for batch in doubling.batches[:25])
    await batcher.close()


async def test_no_more_is_admitted_than_the_queue_takes() -> None:
    batcher = Batcher(Doubling(), max_batch=4, queue=10)
    with batcher.admission(7):
        assert batcher.admitted == 7
        with pytest.raises(ApiError, match="try again in") as caught, batcher.admission(4):
            pass
        assert caught.value.status == 429
        with batcher.admission(3):
            assert batcher.admitted == 10
    assert batcher.admitted == 0
    await batcher.close()


async def test_requests_that_fetch_take_no_places_of_others() -> None:
    batcher = Batcher(Doubling(), max_batch=4, queue=600)
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
    await batcher.close()


async def test_a_failed_batch_fails_its_requests_and_no_others() -> None:
    batcher = Batcher(Doubling(), max_batch=4, queue=100)
    with pytest.raises(ValueError, match="minus one"):
        await batcher.submit([1, -1, 2, 3, 4, 5, 6])
    assert batcher.alive
    assert await batcher.submit([3]) == [6]
    await batcher.close()


async def test_what_a_client_no_longer_waits_for_is_not_computed() -> None:
    doubling = Doubling(gate=False)
    batcher = Batcher(doubling, max_batch=2, queue=100)
    first = asyncio.create_task(batcher.submit([1, 2]))
    await seen(doubling)
    left = asyncio.create_task(batcher.submit([100] * 50))
    kept = asyncio.create_task(batcher.submit([5]))
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.sleep(0)
    doubling.gate.set()
    assert await first == [2, 4]
    assert await kept == [10]
    assert doubling.batches == [[1, 2], [5]]
    await batcher.close()


async def test_closing_finishes_what_was_submitted() -> None:
    doubling = Doubling(gate=False)
    batcher = Batcher(doubling, max_batch=2, queue=100)
    tasks = [asyncio.create_task(batcher.submit([number] * 5)) for number in range(3)]
    await seen(doubling)
    closing = asyncio.create_task(batcher.close())
    await asyncio.sleep(0.01)
    assert not closing.done()
    doubling.gate.set()
    assert await asyncio.gather(*tasks) == [[0] * 5, [2] * 5, [4] * 5]
    await closing
    assert not batcher.alive


async def test_items_and_batches_are_counted() -> None:
    def figures(metrics: Metrics) -> dict[str, float]:
        lines = [line.split() for line in metrics.text().decode().splitlines() if line.startswith("bridgetower_")]
        return {name.removeprefix("bridgetower_"): float(value) for name, value in lines}

    async def failing(metrics: Metrics) -> None:
        batcher = Batcher(Doubling(), max_batch=1, queue=9, metrics=metrics)
        try:
            await batcher.submit([-1, 1, 1])
        finally:
            await batcher.close()

    metrics, doubling = Metrics(), Doubling(gate=False)
    batcher = Batcher(doubling, max_batch=2, queue=9, metrics=metrics)
    with batcher.admission(5):
        tasks = [asyncio.create_task(batcher.submit([number] * 5)) for number in (1, 2)]
        await seen(doubling)
        found = figures(metrics)
        assert (found["items_admitted"], found["items_queued"], found["items_computing"]) == (5, 8, 2)
        tasks[1].cancel()
        await asyncio.gather(tasks[1], return_exceptions=True)
        assert figures(metrics)["items_queued"] == 4
        doubling.gate.set()
        assert await tasks[0] == [2] * 5
    assert await batcher.submit([]) == []
    await batcher.close()
    found = figures(metrics)
    assert [found[f"items_{name}"] for name in ("admitted", "queued", "computing")] == [0, 0, 0]
    assert found["batch_items_sum"] == sum(map(len, doubling.batches))
    assert found["batch_seconds_sum"] > 0
    assert found["queue_seconds_count"] == len(doubling.batches) + 1  # the first batch has items of both requests
    with pytest.raises(ValueError, match="minus one"):
        await failing(metrics)
    assert figures(metrics)["items_queued"] == 0


async def test_an_item_that_fails_fails_alone() -> None:
    doubling = Doubling(gate=False)
    batcher = Batcher(doubling, max_batch=8, queue=100)
    first = asyncio.create_task(batcher.submit([1]))
    await seen(doubling)
    others = [asyncio.create_task(batcher.submit(numbers)) for numbers in ([2, 3], [4, -1], [5])]
    await asyncio.sleep(0)
    doubling.gate.set()
    assert await asyncio.gather(first, *others, return_exceptions=True) == [[2], [4, 6], ANY, [10]]
    with pytest.raises(ValueError, match="minus one"):
        await others[1]
    assert batcher.alive
    await batcher.close()


async def test_a_model_that_always_fails_is_not_alive_until_it_computes_again() -> None:
    batcher = Batcher(Doubling(), max_batch=8, queue=100)
    for alive in (True, True, False):
        with pytest.raises(ValueError, match="minus one"):
            await batcher.submit([-1, -1])
        assert batcher.alive == alive
    assert await batcher.submit([1]) == [2]
    assert batcher.alive
    await batcher.close()


async def test_the_time_to_wait_is_that_of_all_that_is_queued() -> None:
    batcher = Batcher(Doubling(), max_batch=4, queue=100)
    with batcher.admission(90):
        with pytest.raises(ApiError) as refused, batcher.admission(20):
            pass
        assert refused.value.headers == {"Retry-After": "23"}  # 90 items at 4 a second
    await batcher.close()
